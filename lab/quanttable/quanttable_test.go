package quanttable

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
)

// The test program stands in for lathe and for a peer: it writes what it is asked to.
func TestMain(m *testing.M) {
	if os.Getenv("QUANTTABLE_FAKE") == "" {
		os.Exit(m.Run())
	}
	if err := fake(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "lathe:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// fake answers as both programs do. Method "refuses" fails; outputs are those of the float network, shifted by
// 1/bits, and a peer's run gives Lathe's outputs.
func fake(args []string) error {
	flag := func(name string) string {
		if i := slices.Index(args, name); i >= 0 {
			return args[i+1]
		}
		return ""
	}
	if args[0] == "variants" {
		fmt.Println(`{"tool":"other","version":"Other 1","variants":[{"name":"static","bits":8,"activation_bits":8}]}`)
		return nil
	}
	if flag("--method") == "refuses" {
		return fmt.Errorf("site %q cannot be served", "head")
	}
	dir := filepath.Dir(flag("--eval"))
	a, err := data.ReadNPYFile(filepath.Join(dir, "float.npy"))
	if err != nil {
		return err
	}
	v := a.Float32s()
	if args[0] == "run" {
		if a, err = data.ReadNPYFile(filepath.Join(dir, "outputs.npy")); err != nil {
			return err
		}
		v = a.Float32s()
	} else {
		for i := range v { // the second class gains
			if i%a.Shape[1] == 1 {
				v[i] += 8 / float32(len(flag("--bits"))+int(flag("--bits")[0]-'0'))
			}
		}
		out := flag("-o") + flag("--out")
		if err := os.WriteFile(out, make([]byte, 100), 0o644); err != nil {
			return err
		}
		fmt.Println(`{"size":{"parameters":40},"seconds":1.5}`)
	}
	return data.WriteNPYFile(flag("--save-outputs"), a.Shape, v)
}

func TestTableOfASmallNetwork(t *testing.T) {
	t.Setenv("QUANTTABLE_FAKE", "1")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	prepared := 0
	small := Network{Name: "small", Title: "Small", Measure: "accuracy, %", prepare: func(p *preparation) error {
		prepared++
		b := nn.NewBuilder(1)
		x := b.Input("x", shapes.Make(dtypes.Float32, 1, 3))
		net, err := b.Finish(b.Add("head", nn.Dense{Out: 4}, x))
		if err != nil {
			return err
		}
		x1 := make([]float32, 30)
		for i := range x1 {
			x1[i] = float32(i%7) - 3
		}
		p.truth.Labels = make([]int, 10)
		for _, part := range []string{"calib", "eval"} {
			if err := p.write(part, 0, []int{10, 3}, x1); err != nil {
				return err
			}
		}
		return p.save(net)
	}}
	o := Options{
		Lathe: self, Peer: []string{self}, Work: t.TempDir(), CPU: "cpu", Backend: "b",
		Contestants: []Contestant{{Tool: "lathe", Method: "a", Bits: 8, ActBits: 8}, {Tool: "lathe", Method: "a", Bits: 4, ActBits: 8}, {Tool: "lathe", Method: "refuses", Bits: 8, ActBits: 8}},
	}
	var b compute.Backend = enginetest.Backend()
	first, err := Run(context.Background(), b, []Network{small}, o)
	if err != nil {
		t.Fatal(err)
	}
	r := first.Rows[0]
	if len(r.Cells) != 4 || r.Cells[0].Refused != "" || r.Cells[0].File != 100 || r.Cells[0].Parameters != 40 || r.Cells[0].Seconds != 1.5 {
		t.Fatalf("%+v", r.Cells)
	}
	if c := r.Cells[0].RuntimeCosine; math.Abs(c-1) > 1e-6 {
		t.Errorf("the exported file gives the same outputs, cosine %v", c)
	}
	if want := `site "head" cannot be served`; r.Cells[2].Refused != want {
		t.Errorf("refused: %q, want %q", r.Cells[2].Refused, want)
	}
	if c := r.Cells[3]; c.Tool != "other" || c.Method != "static" || c.RuntimeCosine != 0 {
		t.Errorf("the peer's cell is %+v", c)
	}
	if r.Cells[0].KL >= r.Cells[1].KL {
		t.Errorf("divergence %v at 8 bits and %v at 4", r.Cells[0].KL, r.Cells[1].KL)
	}
	// finished cells are not measured again
	o.Lathe, o.Peer = filepath.Join(t.TempDir(), "gone"), nil
	again, err := Run(context.Background(), b, []Network{small}, o)
	if err != nil {
		t.Fatal(err)
	}
	if prepared != 1 || len(again.Rows[0].Cells) != 3 || again.Rows[0].Cells[1].Value != r.Cells[1].Value {
		t.Errorf("prepared %d times; %+v", prepared, again.Rows[0].Cells)
	}
	text := string(first.Markdown())
	for _, want := range []string{"### Small", "| a |", "other: static", "refuses at 8 bits: site", "At 8 bits the best of Lathe (a", "Other 1"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %q:\n%s", want, text)
		}
	}
	raw, err := json.Marshal(first)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "t.json")
	if err := os.WriteFile(path, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	read, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	read.Merge(&Table{Rows: []Row{{Network: "small", Title: "Newer"}, {Network: "vit"}}})
	if len(read.Rows) != 2 || read.Rows[slices.IndexFunc(read.Rows, func(r Row) bool { return r.Network == "small" })].Title != "Newer" {
		t.Errorf("merged: %+v", read.Rows)
	}
}

func TestQualityOfLines(t *testing.T) {
	j := &judge{truth: truth{Lines: []string{"ab a"}, Alphabet: []string{"a", "b"}}, dims: []int{1, 6, 4}}
	out := func(classes ...int) []float32 {
		v := make([]float32, 24)
		for p, c := range classes {
			v[4*p+c] = 1
		}
		return v
	}
	for _, c := range []struct {
		classes []int
		want    float64
	}{
		{[]int{1, 1, 2, 3, 1, 0}, 100},                // a (twice: one), b, space, a
		{[]int{1, 0, 1, 2, 1, 0}, 100 * (3 - 1) / 3.}, // a, blank, a: two of them
		{[]int{0, 0, 0, 0, 0, 0}, 0},
	} {
		j.float = out(c.classes...)
		q, err := j.quality(out(c.classes...))
		if err != nil {
			t.Fatal(err)
		}
		if math.Abs(q.Value-c.want) > 1e-9 {
			t.Errorf("%v: %v %% right, want %v", c.classes, q.Value, c.want)
		}
	}
	// One position of six is undecided between its four classes: the divergence is that of its probabilities.
	j.float = out(1, 1, 2, 3, 1, 0)
	undecided := out(1, 1, 2, 3, 1, 0)
	copy(undecided[8:12], []float32{.25, .25, .25, .25})
	if q, err := j.quality(undecided); err != nil || math.Abs(q.KL-math.Log(4)/6) > 1e-9 {
		t.Errorf("divergence %g, want %g (%v)", q.KL, math.Log(4)/6, err)
	}
}

func TestQualityOfEmbeddingsAndClasses(t *testing.T) {
	float := []float32{1, 0, .9, .1, 0, 1, -1, .2}
	j := &judge{truth: truth{Pairs: true}, float: float, dims: []int{4, 2}}
	q, err := j.quality(float)
	if err != nil || math.Abs(q.Value-100) > 1e-9 || math.Abs(q.Cosine-1) > 1e-9 {
		t.Errorf("%+v %v", q, err)
	}
	if q, _ = j.quality([]float32{1, 0, -1, .1, 0, 1, .9, .2}); q.Value > 50 {
		t.Errorf("exchanged embeddings still agree: %+v", q)
	}
	j.truth = truth{} // no labels: the float network's classes
	if q, err = j.quality([]float32{1, 0, 0, 1, 0, 1, 0, 1}); err != nil || q.Value != 75 || !(q.Low < 75 && q.High > 75) {
		t.Errorf("%+v %v", q, err)
	}
	if _, err = j.quality(float[:4]); err == nil {
		t.Error("fewer outputs are accepted")
	}
}

func TestWindowsOfFiles(t *testing.T) {
	x := appendWindows(nil, []byte("  abc\n"))
	if len(x) != 2*magikaWindow || x[0] != 'a' || x[2] != 'c' || x[3] != '\n' || x[4] != magikaPadding || x[2*magikaWindow-1] != 'c' || x[magikaWindow] != magikaPadding {
		t.Errorf("%v … %v", x[:6], x[len(x)-6:])
	}
	if _, err := Find("nothing"); err == nil || !strings.Contains(err.Error(), "doc-orientation") {
		t.Errorf("error %v", err)
	}
}
