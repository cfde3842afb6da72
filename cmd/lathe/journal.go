package main

import (
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
)

// journalAge is how long a stopped run is kept that nobody takes up again.
const journalAge = 30 * 24 * time.Hour

// journalDir is where stopped runs of a verb are kept: $LATHE_HOME/VERB, or the folder VERB of the cache.
func journalDir(verb, key string) string {
	root := os.Getenv("LATHE_HOME")
	if root == "" {
		root = data.Dir()
	}
	return filepath.Join(root, verb, key[:24])
}

// openJournal opens the journal of a run, which an earlier one may have left. The key is a hash, in hexadecimal digits, of
// all that the results depend on.
func (a *app) openJournal(verb, key string) (*compress.Journal, error) {
	dir := journalDir(verb, key)
	if err := compress.SweepJournals(filepath.Dir(dir), journalAge); err != nil {
		a.note("%v", err)
	}
	j, err := compress.OpenJournal(dir)
	if err != nil {
		return nil, err
	}
	if n := j.Len(); n > 0 {
		a.note("going on where an earlier run stopped; %d pieces of it are kept in %s", n, dir)
	}
	return j, nil
}

// closeJournal removes the journal of a run that is complete, or that has left nothing in it.
func closeJournal(j *compress.Journal, err error) error {
	if err == nil || j.Len() == 0 {
		return errors.Join(err, j.Remove())
	}
	return err
}

// hashModel adds a model's bytes to a hash.
func hashModel(h hash.Hash, path string) error {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, "model.safetensors")
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(h, f)
	return err
}

// hashExamples adds shapes and values of examples to a hash.
func hashExamples(h hash.Hash, x compress.Examples) error {
	for _, t := range x {
		fmt.Fprint(h, t.Shape())
		if err := t.ConstBytes(func(b []byte) { h.Write(b) }); err != nil {
			return err
		}
	}
	return nil
}
