// Package atomicfile writes files so that a reader, or a process that starts after a crash, sees the old content or
// the new content and never a part of either.
package atomicfile

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
)

// Write calls write with a buffered writer to a temporary file in the folder of path, syncs the file, renames it to
// path and syncs the folder. When write or any step fails (or write panics), the temporary file is removed and what
// was at path stays as it was. A file that is replaced passes its permissions on; a new one has 0666 before umask.
// The folder must exist. A path that is a symbolic link is replaced, not followed.
func Write(path string, write func(w io.Writer) error) (err error) {
	f, err := create(path)
	if err != nil {
		return err
	}
	temp := f.Name()
	done := false
	defer func() {
		if !done {
			f.Close()
			os.Remove(temp)
		}
	}()
	w := bufio.NewWriterSize(f, 1<<16)
	if err := write(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if old, err := os.Lstat(path); err == nil && old.Mode().IsRegular() {
		if err := f.Chmod(old.Mode().Perm()); err != nil {
			return fmt.Errorf("writing %s: %w", path, err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	done = true
	return syncDir(filepath.Dir(path))
}

// WriteFile writes b to path as Write does.
func WriteFile(path string, b []byte) error {
	return Write(path, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
}

// create opens a new file beside path: ".NAME.tmp-RANDOM", so that no pattern such as *.json finds it.
func create(path string) (*os.File, error) {
	dir, name := filepath.Split(path)
	if name == "" || name == "." || name == ".." {
		return nil, fmt.Errorf("writing %q: not the name of a file", path)
	}
	for range 100 {
		temp := filepath.Join(dir, fmt.Sprintf(".%s.tmp-%08x", name, rand.Uint32()))
		f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("writing %s: %w", path, err)
		}
		return f, nil
	}
	return nil, fmt.Errorf("writing %s: no free name for a temporary file", path)
}

// syncDir makes a rename in dir durable. Windows has no such call and needs none.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing folder %s: %w", dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing folder %s: %w", dir, err)
	}
	return nil
}
