package data

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// State of a cached file.
type State int

const (
	Missing State = iota // not there
	Intact               // there, with the right checksum
	Corrupt              // there, with other content, or not readable
)

func (s State) String() string {
	switch s {
	case Intact:
		return "intact"
	case Corrupt:
		return "corrupt"
	default:
		return "missing"
	}
}

// MarshalText writes the state as its word.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// FileStatus is what Check found about one file.
type FileStatus struct {
	Path   string `json:"path"` // below the entry's folder
	State  State  `json:"state"`
	Bytes  int64  `json:"bytes"`            // on disk
	Detail string `json:"detail,omitempty"` // why it is corrupt
}

// Check reads every file of an entry and compares its checksum; the network is not used. It fails only for an unknown
// name or a cancelled context.
func Check(ctx context.Context, name string) ([]FileStatus, error) {
	e, err := Find(name)
	if err != nil {
		return nil, err
	}
	s := e.check(ctx, Dir())
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("data: checking %s: %w", name, err)
	}
	return s, nil
}

func (e Entry) check(ctx context.Context, root string) []FileStatus {
	out := make([]FileStatus, 0, len(e.Files))
	for _, f := range e.Files {
		if ctx.Err() != nil {
			break
		}
		s := FileStatus{Path: f.Path}
		path := e.path(root, f)
		st, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			s.State, s.Detail = Corrupt, err.Error()
		case !st.Mode().IsRegular():
			s.State, s.Detail = Corrupt, "not a file"
		default:
			s.Bytes = st.Size()
			if err := f.verify(path); err != nil {
				s.State, s.Detail = Corrupt, err.Error()
			} else {
				s.State = Intact
			}
		}
		out = append(out, s)
	}
	return out
}
