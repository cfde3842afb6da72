package compress

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

type piece struct {
	Weight []float32
	Bits   int
}

func TestJournalRestoresFinishedPieces(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	calls := 0
	do := func(key string, fail error) (piece, bool, error) {
		j, err := OpenJournal(dir) // as a new process would
		if err != nil {
			t.Fatal(err)
		}
		var p piece
		restored, err := j.Do(key, &p, func() error {
			calls++
			p = piece{[]float32{1, 2, float32(calls)}, 4}
			return fail
		})
		return p, restored, err
	}
	stop := errors.New("stopped")
	if _, _, err := do("a", stop); !errors.Is(err, stop) {
		t.Fatalf("error %v", err)
	}
	first, restored, err := do("a", nil)
	if err != nil || restored || calls != 2 {
		t.Fatalf("a failed piece must not be kept: %v, restored %v, %d calls", err, restored, calls)
	}
	again, restored, err := do("a", nil)
	if err != nil || !restored || calls != 2 || again.Weight[2] != first.Weight[2] {
		t.Fatalf("not restored: %v %v %d %v", err, restored, calls, again)
	}
	if _, restored, _ := do("b", nil); restored {
		t.Fatal("another key was restored")
	}
	j, _ := OpenJournal(dir)
	if j.Len() != 2 {
		t.Fatalf("%d pieces", j.Len())
	}
	if err := os.WriteFile(j.path("a"), []byte("half a fi"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, restored, err := do("a", nil); restored || err != nil {
		t.Fatalf("a damaged piece must be computed again: %v %v", restored, err)
	}
	if err := j.Remove(); err != nil {
		t.Fatal(err)
	}
	if j.Len() != 0 {
		t.Fatal("not removed")
	}
	var none *Journal
	if restored, err := none.Do("a", &piece{}, func() error { return nil }); restored || err != nil {
		t.Fatal(restored, err)
	}
}

func TestJournalKeepsWhatIsUnderWay(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	open := func() *Journal {
		j, err := OpenJournal(dir)
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	var p piece
	if found, err := open().Load("a", &p); found || err != nil {
		t.Fatal(found, err)
	}
	for bits := range 3 {
		if err := open().Store("a", &piece{Bits: bits + 1}); err != nil {
			t.Fatal(err)
		}
	}
	if found, err := open().Load("a", &p); !found || err != nil || p.Bits != 3 {
		t.Fatalf("the last one is %+v: %v %v", p, found, err)
	}
	if restored, err := open().Do("a", &p, func() error { return errors.New("computed again") }); !restored || err != nil {
		t.Fatal(restored, err)
	}
	if err := os.WriteFile(open().File("b"), []byte("a checkpoint"), 0o644); err != nil {
		t.Fatal(err)
	}
	if n := open().Len(); n != 2 {
		t.Errorf("%d pieces; a checkpoint is one too", n)
	}
	if err := os.WriteFile(open().path("a"), []byte("half a fi"), 0o644); err != nil {
		t.Fatal(err)
	}
	if found, err := open().Load("a", &piece{}); found || err != nil || open().Len() != 1 {
		t.Errorf("a damaged piece: %v %v", found, err)
	}
	var none *Journal
	if found, err := none.Load("a", &p); found || err != nil || none.Store("a", &p) != nil {
		t.Error(found, err)
	}
}

func TestOldJournalsAreSwept(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"00ff00", "aa11", "not a journal"} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name, "x.gob"), []byte{1}, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	long := time.Now().Add(-50 * time.Hour)
	for _, path := range []string{"00ff00/x.gob", "00ff00", "not a journal/x.gob", "not a journal", "aa11"} {
		if err := os.Chtimes(filepath.Join(root, path), long, long); err != nil {
			t.Fatal(err)
		}
	}
	if err := SweepJournals(root, 40*time.Hour); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"00ff00": false, "aa11": true, "not a journal": true} {
		if _, err := os.Stat(filepath.Join(root, name)); (err == nil) != want {
			t.Errorf("%s: there %v, want %v", name, err == nil, want)
		}
	}
	if err := SweepJournals(filepath.Join(root, "none"), time.Hour); err != nil {
		t.Errorf("a folder that is not there: %v", err)
	}
}
