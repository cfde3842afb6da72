package internal_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/lathe-ml/lathe/"

// order is the rooms from left to right: a package imports from its own room and from those to the left, never to the
// right. catalog and docs are leaves: they import internal alone, and everyone to their right may use them.
var order = []string{"internal", "catalog", "docs", "engine", "nn", "data", "learn", "design", "compress", "adapt", "task", "lab", "cmd"}

// leaves import nothing of the project but internal.
var leaves = []string{"catalog", "docs"}

func TestNothingImportsToItsRight(t *testing.T) {
	root := ".."
	checked := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path == root {
				return nil
			}
			// Folders that the go tool ignores, and modules of their own, have rules of their own.
			if strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata" {
				return filepath.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		room, _, _ := strings.Cut(rel, "/")
		if room == "test" || !strings.Contains(rel, "/") {
			return nil // whole-program tests stand outside
		}
		at := slices.Index(order, room)
		if at < 0 {
			t.Errorf("%s: %q is not one of the rooms %v", rel, room, order)
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range f.Imports {
			p, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			p, ours := strings.CutPrefix(p, module)
			if !ours {
				continue
			}
			checked++
			to, _, _ := strings.Cut(p, "/")
			switch i := slices.Index(order, to); {
			case i < 0:
				t.Errorf("%s imports %q, which is in none of the rooms", rel, p)
			case to == "data" && strings.HasSuffix(name, "_test.go"):
				// Tests of every room may ask for data with data.RequireTest.
			case i > at:
				t.Errorf("%s imports %q: room %s stands to the right of %s", rel, p, to, room)
			case slices.Contains(leaves, room) && to != room && to != "internal":
				t.Errorf("%s imports %q: %s is a leaf and imports internal alone", rel, p, room)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if checked < 50 {
		t.Fatalf("only %d imports were found; is the test run in its folder?", checked)
	}
}
