package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/lab/store"
)

// Load puts the result of a stored run of an experiment together again, curves and pictures included.
func Load(ctx context.Context, s *store.Store, id int64) (*Result, error) {
	run, err := s.Run(ctx, id)
	if err != nil {
		return nil, err
	}
	if run.Kind != "try" || run.Result == nil {
		return nil, fmt.Errorf("run %d (%s, %s) has no result of an experiment", id, run.Kind, run.Status)
	}
	r, err := ParseResult(run.Result)
	if err != nil {
		return nil, fmt.Errorf("run %d: %w", id, err)
	}
	r.Run = id
	units, err := s.Units(ctx, id)
	if err != nil {
		return nil, err
	}
	for _, stored := range units {
		arm := slices.IndexFunc(r.Arms, func(a ArmResult) bool { return a.Name == stored.Key.Arm })
		if arm < 0 {
			continue
		}
		u := fromStore(stored, arm)
		list, err := s.UnitArtefacts(ctx, stored.ID)
		if err != nil {
			return nil, err
		}
		for _, a := range list {
			b, err := s.Content(a)
			if err != nil {
				return nil, err
			}
			u.images = append(u.images, store.Blob{Name: a.Name, Media: a.Media, Content: b})
		}
		r.units = append(r.units, u)
	}
	return r, nil
}

// ReadResults reads all METHOD.json of a folder, by method.
func ReadResults(fsys fs.FS) (map[string]*Result, error) {
	entries, err := fs.ReadDir(fsys, ".")
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]*Result{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("results: %w", err)
	}
	results := map[string]*Result{}
	for _, e := range entries {
		if e.IsDir() || !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		b, err := fs.ReadFile(fsys, path.Join(".", e.Name()))
		if err != nil {
			return nil, fmt.Errorf("results: %w", err)
		}
		r, err := ParseResult(b)
		if err != nil {
			return nil, fmt.Errorf("results: %s: %w", e.Name(), err)
		}
		if r.Method+".json" != e.Name() {
			return nil, fmt.Errorf("results: %s: is of method %q", e.Name(), r.Method)
		}
		results[r.Method] = r
	}
	return results, nil
}
