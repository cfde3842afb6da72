package lab

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// networkBench trains a tiny network by adding 1 to all its parameters, and counts how often.
type networkBench struct {
	mu      sync.Mutex
	trained int
	log     []string
	hidden  int
}

func (b *networkBench) trial(dir string) *Trial {
	return &Trial{networks: dir, observe: func(e Event) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.log = append(b.log, e.Message)
	}}
}

func (b *networkBench) build() (*nn.Network, error) {
	return zoo.MLP(zoo.MLPOptions{Inputs: 3, Hidden: []int{b.hidden}, Classes: 2, Norm: nn.BatchNorm{}, Seed: 1})
}

func (b *networkBench) train(n *nn.Network) error {
	b.mu.Lock()
	b.trained++
	b.mu.Unlock()
	for p := range n.Params.All() {
		d := p.Data()
		for i := range d {
			d[i]++
		}
		if err := p.SetData(d); err != nil {
			return err
		}
	}
	return nil
}

func values(n *nn.Network) (v []float32) {
	for p := range n.Params.All() {
		v = append(v, p.Data()...)
	}
	return v
}

func TestNetworkIsTrainedOncePerRecipe(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "networks")
	b := &networkBench{hidden: 4}
	type recipe struct {
		Arch string
		Seed int
	}
	first, err := b.trial(dir).Network(recipe{"mlp", 1}, b.build, b.train)
	if err != nil {
		t.Fatal(err)
	}
	want := values(first)
	// The order of fields does not count, and another trial finds it.
	again, err := b.trial(dir).Network(map[string]any{"Seed": 1, "Arch": "mlp"}, b.build, b.train)
	if err != nil || b.trained != 1 || !slices.Equal(values(again), want) {
		t.Fatalf("trained %d times, %v", b.trained, err)
	}
	// Nobody shares the parameters.
	if err := b.train(again); err != nil {
		t.Fatal(err)
	}
	third, err := b.trial(dir).Network(recipe{"mlp", 1}, b.build, b.train)
	if err != nil || !slices.Equal(values(third), want) {
		t.Fatalf("a change of one network shows in another: %v", err)
	}
	if _, err := b.trial(dir).Network(recipe{"mlp", 2}, b.build, b.train); err != nil || b.trained != 3 {
		t.Errorf("another recipe: trained %d times, %v", b.trained, err)
	}
}

func TestDamagedNetworkIsTrainedAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "networks")
	b := &networkBench{hidden: 4}
	get := func() []float32 {
		t.Helper()
		n, err := b.trial(dir).Network("r", b.build, b.train)
		if err != nil {
			t.Fatal(err)
		}
		return values(n)
	}
	want := get()
	files, _ := filepath.Glob(filepath.Join(dir, "*.safetensors"))
	if len(files) != 1 {
		t.Fatalf("cache holds %v", files)
	}
	good, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)-3] ^= 0x10
	for name, content := range map[string][]byte{"one bit flipped": flipped, "cut": good[:len(good)-8], "empty": {}, "text": []byte("hello, I am no model")} {
		if err := os.WriteFile(files[0], content, 0o644); err != nil {
			t.Fatal(err)
		}
		before := b.trained
		b.log = nil
		if !slices.Equal(get(), want) || b.trained != before+1 || !strings.Contains(strings.Join(b.log, "\n"), "trained again") {
			t.Errorf("%s: trained %d times more, log %q", name, b.trained-before, b.log)
		}
	}
	before := b.trained
	b.hidden = 5 // build has changed under the same recipe
	if n := get(); len(n) == len(want) || b.trained != before+1 {
		t.Errorf("a network of another shape: trained %d times more", b.trained-before)
	}
}

func TestNetworkIsTrainedByOneAtATime(t *testing.T) {
	dir := t.TempDir()
	b := &networkBench{hidden: 4}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			_, err := b.trial(dir).Network("r", b.build, func(n *nn.Network) error {
				time.Sleep(20 * time.Millisecond)
				return b.train(n)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if b.trained != 1 {
		t.Errorf("trained %d times, want once", b.trained)
	}
}

func TestFailedTrainingLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	b := &networkBench{hidden: 4}
	sad := errors.New("diverged")
	if _, err := b.trial(dir).Network("r", b.build, func(*nn.Network) error { return sad }); !errors.Is(err, sad) {
		t.Errorf("got %v", err)
	}
	if files, _ := os.ReadDir(dir); len(files) != 0 {
		t.Errorf("%d files are left", len(files))
	}
	if _, err := b.trial("").Network("r", b.build, b.train); err != nil || b.trained != 1 {
		t.Errorf("without a cache: %v, trained %d times", err, b.trained)
	}
}
