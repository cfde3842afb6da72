package compress

import (
	"crypto/sha256"
	"encoding/gob"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/lathe-ml/lathe/internal/atomicfile"
)

// Journal keeps on disk what a compression has finished, piece by piece, so that a run that was stopped computes
// nothing twice. It belongs to one run: the folder of another model, method, setting or set of examples is another one
// (the caller names it by a hash of all of these). A nil Journal keeps nothing.
type Journal struct {
	dir string
	mu  sync.Mutex
}

// How the files of a journal end.
const (
	pieceExt = ".gob"
	partExt  = ".part"
)

// OpenJournal opens or begins the journal in a folder.
func OpenJournal(dir string) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("compress: journal: %w", err)
	}
	return &Journal{dir: dir}, nil
}

// Do fills value, a pointer to something that encoding/gob can hold, with what the journal keeps under key, and reports
// true; or calls f, which fills it, and keeps it. A piece that cannot be read, as after a full disk, is computed again.
func (j *Journal) Do(key string, value any, f func() error) (restored bool, err error) {
	if j == nil {
		return false, f()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if found, err := j.load(key, value); found || err != nil {
		return found, err
	}
	if err := f(); err != nil {
		return false, err
	}
	return false, j.store(key, value)
}

// Load fills value with what the journal keeps under key, and reports whether it does. A piece that cannot be read is
// deleted, and value is then to be filled anew.
func (j *Journal) Load(key string, value any) (found bool, err error) {
	if j == nil {
		return false, nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.load(key, value)
}

// Store keeps value under key, in place of what was there: for what is kept while it is not finished, where Do keeps what
// is. In a nil Journal it does nothing.
func (j *Journal) Store(key string, value any) error {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.store(key, value)
}

func (j *Journal) load(key string, value any) (found bool, err error) {
	path := j.path(key)
	switch err := readPiece(path, value); {
	case err == nil:
		return true, nil
	case !errors.Is(err, fs.ErrNotExist):
		if err := os.Remove(path); err != nil {
			return false, fmt.Errorf("compress: journal: %w", err)
		}
	}
	return false, nil
}

func (j *Journal) store(key string, value any) error {
	return atomicfile.Write(j.path(key), func(w io.Writer) error { return gob.NewEncoder(w).Encode(value) })
}

func (j *Journal) path(key string) string {
	h := sha256.Sum256([]byte(key))
	return filepath.Join(j.dir, hex.EncodeToString(h[:12])+pieceExt)
}

func readPiece(path string, value any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return gob.NewDecoder(f).Decode(value)
}

// File is where in the journal something keeps itself that Do cannot hold, such as the checkpoint of a training under way;
// "" in a nil Journal.
func (j *Journal) File(key string) string {
	if j == nil {
		return ""
	}
	return strings.TrimSuffix(j.path(key), pieceExt) + partExt
}

// Sub is the journal of a part of the run, which keeps its keys apart from this one's; of a nil Journal it is nil. It goes
// with the whole.
func (j *Journal) Sub(name string) (*Journal, error) {
	if j == nil {
		return nil, nil
	}
	return OpenJournal(filepath.Join(j.dir, name))
}

// Len is the number of pieces kept, those of parts and those under way (File) included.
func (j *Journal) Len() (n int) {
	if j == nil {
		return 0
	}
	_ = filepath.WalkDir(j.dir, func(path string, _ fs.DirEntry, err error) error {
		if ext := filepath.Ext(path); err == nil && (ext == pieceExt || ext == partExt) {
			n++
		}
		return nil
	})
	return n
}

// Remove deletes the journal with all it keeps: the run is complete.
func (j *Journal) Remove() error {
	if j == nil {
		return nil
	}
	return os.RemoveAll(j.dir)
}

// SweepJournals deletes the journals in a folder of journals that nothing has written to for some time: those of runs that
// were stopped and never taken up again.
func SweepJournals(root string, age time.Duration) error {
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("compress: journals: %w", err)
	}
	var errs []error
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		if _, err := hex.DecodeString(e.Name()); err != nil || !e.IsDir() || time.Since(newest(dir)) < age {
			continue
		}
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// newest returns when something in a folder was written last; now, if that cannot be seen.
func newest(dir string) (last time.Time) {
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.ModTime().After(last) {
			last = info.ModTime()
		}
		return err
	})
	if err != nil {
		return time.Now()
	}
	return last
}
