package store

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lathe-ml/lathe/internal/filelock"
)

// TestMain lets the test program stand in for another process: it writes units, or starts a run and never ends it.
func TestMain(m *testing.M) {
	if dir := os.Getenv("LATHE_STORE_TEST"); dir != "" {
		s, err := Open(dir)
		if err == nil {
			var a *Active
			if a, err = s.Start(context.Background(), Run{Kind: "try", Method: "child"}); err == nil {
				if os.Getenv("LATHE_STORE_HANG") != "" {
					fmt.Println("started")
					time.Sleep(time.Minute)
				}
				for i := range 20 {
					u := testUnit(uint64(os.Getpid()), fmt.Sprintf("arm%d", i))
					if _, err = s.SaveUnit(context.Background(), a.ID, u); err != nil {
						break
					}
				}
				err = errors.Join(err, a.Finish(context.Background(), Done, nil, nil))
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func testUnit(seed uint64, arm string) Unit {
	return Unit{
		Key:     UnitKey{Method: "m", Scale: "full", Arm: arm, Seed: seed, Config: "c", Backend: "go", Version: "v"},
		Metrics: []Metric{{"accuracy", 87.25}, {"gap", math.NaN()}, {"bytes", 1e9}},
		Series:  []Point{{"loss", 1, 2.5}, {"loss", 2, 1.25}},
		Images:  []Blob{{Name: "after", Media: "image/png", Content: []byte("picture of " + arm)}},
		Started: time.Unix(1, 5), Ended: time.Unix(3, 0),
	}
}

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestUnitReadsBackAsSaved(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	run, err := s.Start(ctx, Run{Kind: "try", Method: "m", Command: []string{"lathe", "try", "m"}, Scale: "full", Seeds: []uint64{0, math.MaxUint64}, Env: Environment{CPU: "test", Cores: 2}})
	if err != nil {
		t.Fatal(err)
	}
	want := testUnit(math.MaxUint64, "a")
	id, err := s.SaveUnit(ctx, run.ID, want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.FindUnit(ctx, want.Key)
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != id || got.Key != want.Key || !got.Started.Equal(want.Started) || !got.Ended.Equal(want.Ended) {
		t.Errorf("got %+v", got)
	}
	if fmt.Sprint(got.Metrics) != fmt.Sprint(want.Metrics) || fmt.Sprint(got.Series) != fmt.Sprint(want.Series) {
		t.Errorf("got %v and %v, want %v and %v", got.Metrics, got.Series, want.Metrics, want.Series)
	}
	list, err := s.UnitArtefacts(ctx, id)
	if err != nil || len(list) != 1 {
		t.Fatalf("artefacts %v, %v", list, err)
	}
	if b, err := s.Content(list[0]); err != nil || string(b) != "picture of a" {
		t.Errorf("content %q, %v", b, err)
	}
	if err := run.Finish(ctx, Done, map[string]int{"x": 1}, nil); err != nil {
		t.Fatal(err)
	}
	r, err := s.Run(ctx, run.ID)
	if err != nil || r.Status != Done || r.Seeds[1] != math.MaxUint64 || string(r.Result) != `{"x":1}` || r.Env.CPU != "test" || r.Ended.Before(r.Started) {
		t.Errorf("run %+v, %v", r, err)
	}
}

func TestFindUnitWantsTheSameKey(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	run, _ := s.Start(ctx, Run{Kind: "try"})
	u := testUnit(1, "a")
	if _, err := s.SaveUnit(ctx, run.ID, u); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(k *UnitKey){
		"seed": func(k *UnitKey) { k.Seed = 2 }, "arm": func(k *UnitKey) { k.Arm = "b" }, "scale": func(k *UnitKey) { k.Scale = "smoke" },
		"config": func(k *UnitKey) { k.Config = "d" }, "backend": func(k *UnitKey) { k.Backend = "xla" }, "version": func(k *UnitKey) { k.Version = "w" }, "method": func(k *UnitKey) { k.Method = "n" },
	} {
		k := u.Key
		change(&k)
		if _, err := s.FindUnit(ctx, k); !errors.Is(err, ErrNotFound) {
			t.Errorf("another %s finds the unit: %v", name, err)
		}
	}
	k := u.Key
	k.Version = ""
	if _, err := s.FindUnit(ctx, k); err != nil {
		t.Errorf("any version: %v", err)
	}
	if _, err := s.SaveUnit(ctx, run.ID, u); err != nil {
		t.Errorf("saving a unit again replaces it: %v", err)
	}
	if list, _ := s.Units(ctx, run.ID); len(list) != 1 {
		t.Errorf("%d units, want 1", len(list))
	}
}

func TestRemoveKeepsWhatOtherRunsUse(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	a, _ := s.Start(ctx, Run{Kind: "try"})
	b, _ := s.Start(ctx, Run{Kind: "try"})
	shared, _ := s.SaveUnit(ctx, a.ID, testUnit(1, "shared"))
	s.SaveUnit(ctx, a.ID, testUnit(1, "own"))
	if err := s.Reuse(ctx, b.ID, shared); err != nil {
		t.Fatal(err)
	}
	s.AddArtefact(ctx, a.ID, Blob{Name: "report.html", Media: "text/html", Content: []byte("<html>")})
	if err := s.Remove(ctx, a.ID); err == nil {
		t.Error("a run that goes on was removed")
	}
	a.Finish(ctx, Done, nil, nil)
	b.Finish(ctx, Done, nil, nil)
	if err := s.Remove(ctx, a.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.FindUnit(ctx, testUnit(1, "shared").Key); err != nil {
		t.Errorf("the shared unit: %v", err)
	}
	if _, err := s.FindUnit(ctx, testUnit(1, "own").Key); !errors.Is(err, ErrNotFound) {
		t.Errorf("the run's own unit is still there: %v", err)
	}
	if n := countFiles(t, filepath.Join(s.Dir(), "artefacts")); n != 1 {
		t.Errorf("%d artefact files are left, want the shared one", n)
	}
	if err := s.Remove(ctx, b.ID); err != nil {
		t.Fatal(err)
	}
	if n := countFiles(t, filepath.Join(s.Dir(), "artefacts")); n != 0 {
		t.Errorf("%d artefact files are left, want none", n)
	}
	if err := s.Remove(ctx, 99); !errors.Is(err, ErrNotFound) {
		t.Errorf("removing a run that is not there: %v", err)
	}
	if err := s.Check(ctx); err != nil {
		t.Error(err)
	}
}

func countFiles(t *testing.T, dir string) (n int) {
	t.Helper()
	filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
		}
		return err
	})
	return n
}

func TestProcessesWriteAtOnce(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "LATHE_STORE_TEST="+dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	wg.Wait()
	s := open(t, dir)
	runs, err := s.Runs(context.Background(), "child", 0)
	if err != nil || len(runs) != 4 {
		t.Fatalf("%d runs, %v", len(runs), err)
	}
	for _, r := range runs {
		if units, err := s.Units(context.Background(), r.ID); err != nil || len(units) != 20 || r.Status != Done {
			t.Errorf("run %d: %s, %d units, %v", r.ID, r.Status, len(units), err)
		}
	}
	if err := s.Check(context.Background()); err != nil {
		t.Error(err)
	}
}

func TestRunOfAKilledProcessIsInterrupted(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "LATHE_STORE_TEST="+dir, "LATHE_STORE_HANG=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var line string
	fmt.Fscanln(out, &line)
	status := func() string {
		s := open(t, dir)
		runs, err := s.Runs(context.Background(), "", 0)
		if err != nil || len(runs) != 1 {
			t.Fatalf("%v, %v", runs, err)
		}
		return runs[0].Status
	}
	if got := status(); got != Running {
		t.Errorf("while its process lives the run is %q", got)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if got := status(); got != Interrupted {
		t.Errorf("after its process died the run is %q", got)
	}
}

func TestOpenRefuses(t *testing.T) {
	newer := t.TempDir()
	s, err := Open(newer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.db.Exec("PRAGMA user_version = 99"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := Open(newer); err == nil || !strings.Contains(err.Error(), "newer lathe") {
		t.Errorf("a store of a newer lathe: %v", err)
	}

	garbage := t.TempDir()
	os.WriteFile(filepath.Join(garbage, "lathe.db"), []byte(strings.Repeat("this is not a database ", 100)), 0o644)
	if _, err := Open(garbage); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a damaged store: %v", err)
	}

	file := filepath.Join(t.TempDir(), "file")
	os.WriteFile(file, nil, 0o644)
	if _, err := Open(file); err == nil {
		t.Error("a file was taken for a folder")
	}
}

func TestStoreIsDurable(t *testing.T) {
	s := open(t, t.TempDir())
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "user_version": fmt.Sprint(len(migrations))} {
		var got string
		if err := s.db.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q, want %q (%v)", pragma, got, want, err)
		}
	}
}

func TestCheckFindsAChangedArtefact(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	run, _ := s.Start(ctx, Run{Kind: "try"})
	id, err := s.SaveUnit(ctx, run.ID, testUnit(1, "a"))
	if err != nil {
		t.Fatal(err)
	}
	list, _ := s.UnitArtefacts(ctx, id)
	if err := os.WriteFile(s.artefactPath(list[0].SHA256), []byte("else"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(ctx); err == nil || !strings.Contains(err.Error(), "has been changed") {
		t.Errorf("got %v", err)
	}
	// The next save of that content mends the file.
	if _, err := s.SaveUnit(ctx, run.ID, testUnit(1, "a")); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(ctx); err != nil {
		t.Error(err)
	}
}

func TestLockExcludes(t *testing.T) {
	s := open(t, t.TempDir())
	l, err := s.Lock("try-m-full")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Lock("try-m-full"); !errors.Is(err, filelock.ErrLocked) {
		t.Errorf("a second holder: %v", err)
	}
	l.Unlock()
	l, err = s.Lock("try-m-full")
	if err != nil {
		t.Fatal(err)
	}
	l.Unlock()
}

func TestDefaultDir(t *testing.T) {
	t.Setenv("LATHE_HOME", "/somewhere")
	if d, err := DefaultDir(); err != nil || d != "/somewhere" {
		t.Errorf("%q, %v", d, err)
	}
	t.Setenv("LATHE_HOME", "")
	t.Setenv("XDG_DATA_HOME", "/data")
	if d, err := DefaultDir(); err != nil || d != filepath.Join("/data", "lathe") {
		t.Errorf("%q, %v", d, err)
	}
}
