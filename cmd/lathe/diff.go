package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
)

type diffFlags struct {
	calib, data, preprocess string
	cases, batch, tokens    int
	shapes                  []string
	seed                    uint64
	threshold               float64
}

// difference is what lathe diff prints.
type difference struct {
	A       string             `json:"a"`
	B       string             `json:"b"`
	Inputs  string             `json:"inputs"` // what both were run on
	Cases   int                `json:"cases"`
	Quality compress.Agreement `json:"agreement"` // of B's first output with A's
	Bars    compress.Bars      `json:"agreement_95"`
	// Embedding says that the outputs are directions, not classes: the cosine counts.
	Embedding bool             `json:"embedding,omitempty"`
	MaxDiff   float64          `json:"max_difference"`
	Matched   string           `json:"matched"`         // how sites were paired: by name, by order
	Parts     string           `json:"parts,omitempty"` // first site whose error passes the threshold; empty: none
	Sites     []siteDifference `json:"sites"`
	OnlyA     []string         `json:"only_in_a,omitempty"`
	OnlyB     []string         `json:"only_in_b,omitempty"`
	Ops       []opDifference   `json:"operations,omitempty"` // kinds of which one has more
	Notes     []string         `json:"notes,omitempty"`

	threshold float64
}

// siteDifference compares a site's output and weight in both networks.
type siteDifference struct {
	A         string  `json:"a"`
	B         string  `json:"b"`
	Kind      string  `json:"kind"`
	Error     float64 `json:"error"`        // ‖b − a‖²/‖a‖² of the outputs, everything before it being as in each network
	Weight    float64 `json:"weight_error"` // ‖b − a‖²/‖a‖² of the weights; -1: not comparable
	StoredA   string  `json:"stored_a"`
	StoredB   string  `json:"stored_b"`
	Different string  `json:"different,omitempty"` // why outputs cannot be compared
}

type opDifference struct {
	Kind string `json:"kind"`
	A    int    `json:"a"`
	B    int    `json:"b"`
}

func newDiffCommand(a *app) *cobra.Command {
	var f diffFlags
	cmd := &cobra.Command{
		Use:   "diff A B",
		Short: "Where two networks part: outputs site by site on the same inputs",
		Long: `Run two networks on the same inputs and say how alike their outputs are and where they part: the relative squared error of
every site's output, in execution order. Sites are paired by name, or by their order and shape when the names differ, as
after an export. For networks of different structure it says what is in one alone.

The inputs are --calib examples, or --data; else random ones are drawn, on which networks trained on something else may
differ more, or less, than on their own data.`,
		Example: `  lathe diff vit.onnx vit4.onnx --calib images/
  lathe diff model.safetensors exported.onnx
  lathe diff before.onnx after.onnx --calib cases.npy --json`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageErrorf("diff needs two networks, got %d", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case f.cases < 1 || f.batch < 1:
				return usageErrorf("--cases %d, --batch %d: must be positive", f.cases, f.batch)
			case f.calib != "" && f.data != "":
				return usageErrorf("give --calib or --data, not both")
			case f.data != "" && !slices.Contains(labelledSets(), f.data):
				return chooseOne("data", f.data, labelledSets())
			case !(f.threshold > 0):
				return usageErrorf("--threshold %g; it must be positive", f.threshold)
			}
			if _, err := parsePreprocessing(f.preprocess); err != nil {
				return err
			}
			r, err := diff(cmd.Context(), a, args[0], args[1], f)
			if err != nil {
				return err
			}
			return a.emit(r, func(w io.Writer) error { return r.write(w, a.width()) })
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.calib, "calib", "", "inputs: a folder of pictures, .npy, or .txt (default: random ones)")
	fl.StringVar(&f.data, "data", "", "or the test part of a data set: "+strings.Join(labelledSets(), ", "))
	fl.IntVar(&f.cases, "cases", 64, "most cases")
	fl.IntVar(&f.batch, "batch", 32, "cases per pass")
	fl.StringVar(&f.preprocess, "preprocess", "", "how pictures become inputs; see lathe compress --help")
	fl.StringArrayVar(&f.shapes, "shape", nil, "shape of an input that a model leaves open, name=1,3,48,320; may be repeated")
	fl.IntVar(&f.tokens, "tokens", 0, "length of a BERT encoder's inputs (default: 128)")
	fl.Uint64Var(&f.seed, "seed", 0, "seed of random inputs")
	fl.Float64Var(&f.threshold, "threshold", 1e-3, "relative squared error from which a site counts as different")
	_ = cmd.RegisterFlagCompletionFunc("data", oneOf(labelledSets()...))
	return cmd
}

func diff(ctx context.Context, a *app, pathA, pathB string, f diffFlags) (*difference, error) {
	dims, err := parseShapes(f.shapes)
	if err != nil {
		return nil, err
	}
	netA, err := readAnyNetwork(pathA, dims, f.tokens)
	if err != nil {
		return nil, err
	}
	netB, err := readAnyNetwork(pathB, dims, f.tokens)
	if err != nil {
		return nil, err
	}
	r := &difference{A: pathA, B: pathB, threshold: f.threshold}
	if err := sameInputs(netA, netB); err != nil {
		return nil, fmt.Errorf("%s and %s: %w", pathA, pathB, err)
	}
	backend, err := a.backend()
	if err != nil {
		return nil, err
	}
	var x compress.Examples
	if f.calib == "" && f.data == "" {
		if x, err = randomExamples(netA, f.cases, f.seed); err != nil {
			return nil, err
		}
		r.Inputs = fmt.Sprintf("%d random inputs", f.cases)
	} else {
		if x, _, r.Inputs, err = (exampleSource{model: pathA, inputs: f.calib, data: f.data, preprocess: f.preprocess}).load(ctx, netA, f.cases); err != nil {
			return nil, err
		}
	}
	r.Cases = x.Len()
	pairs, err := r.pair(netA, netB)
	if err != nil {
		return nil, err
	}
	if err := r.compareWeights(netA, netB, pairs, func(net *nn.Network, n *nn.Node) (*tensors.Tensor, error) {
		return compress.EffectiveWeight(backend, net, n)
	}); err != nil {
		return nil, err
	}
	bar := a.progress("comparing")
	defer bar.Close()
	return r, r.run(ctx, compareRun{backend: backend, a: netA, b: netB, pairs: pairs, x: x, batch: min(f.batch, x.Len()), bar: bar})
}

// sameInputs says whether two networks take the same inputs, whatever they call them.
func sameInputs(a, b *nn.Network) error {
	if len(a.Inputs) != len(b.Inputs) {
		return fmt.Errorf("one takes %d inputs, the other %d; there is nothing to run both on", len(a.Inputs), len(b.Inputs))
	}
	for i := range a.Inputs {
		s, t := a.Inputs[i].Shape, b.Inputs[i].Shape
		if s.DType != t.DType || s.Rank() != t.Rank() || s.Rank() > 0 && !slices.Equal(s.Dimensions[1:], t.Dimensions[1:]) {
			return fmt.Errorf("input %q is %s in one and %s in the other; there is nothing to run both on", a.Inputs[i].Name, s, t)
		}
	}
	return nil
}

// pair finds the sites that are the same in both: by name, or by order and shape where no names agree.
func (r *difference) pair(a, b *nn.Network) (pairs [][2]*nn.Node, err error) {
	sh := [2]map[string]string{}
	for i, net := range []*nn.Network{a, b} {
		s, err := net.Shapes(1)
		if err != nil {
			return nil, err
		}
		sh[i] = map[string]string{}
		for _, n := range net.Sites() {
			sh[i][n.Name] = fmt.Sprint(n.Op.Kind(), s[n.Out[0]].Dimensions)
		}
	}
	partner := map[string]*nn.Node{}
	used := map[string]bool{}
	r.Matched = "by name"
	for _, n := range a.Sites() {
		if m := b.Node(n.Name); m != nil && sh[1][m.Name] != "" {
			partner[n.Name], used[m.Name] = m, true
		}
	}
	rest, byOrder := slices.DeleteFunc(b.Sites(), func(m *nn.Node) bool { return used[m.Name] }), 0
	for _, n := range a.Sites() {
		if partner[n.Name] != nil {
			continue
		}
		if i := slices.IndexFunc(rest, func(m *nn.Node) bool { return sh[0][n.Name] == sh[1][m.Name] }); i >= 0 {
			partner[n.Name], used[rest[i].Name] = rest[i], true
			rest = rest[i+1:]
			byOrder++
		}
	}
	switch {
	case byOrder > 0 && byOrder == len(partner):
		r.Matched = "by order and shape"
	case byOrder > 0:
		r.Matched = fmt.Sprintf("by name, %d by order and shape", byOrder)
	}
	paired := map[string]bool{}
	for _, n := range a.Sites() {
		if m := partner[n.Name]; m != nil {
			pairs = append(pairs, [2]*nn.Node{n, m})
			paired[n.Name] = true
		}
	}
	for _, n := range a.Sites() {
		if !paired[n.Name] {
			r.OnlyA = append(r.OnlyA, n.Name)
		}
	}
	for _, n := range b.Sites() {
		if !used[n.Name] {
			r.OnlyB = append(r.OnlyB, n.Name)
		}
	}
	count := map[string]*opDifference{}
	for i, net := range []*nn.Network{a, b} {
		for _, n := range net.Nodes {
			k := n.Op.Kind()
			if count[k] == nil {
				count[k] = &opDifference{Kind: k}
			}
			if i == 0 {
				count[k].A++
			} else {
				count[k].B++
			}
		}
	}
	for _, k := range slices.Sorted(maps.Keys(count)) {
		if c := count[k]; c.A != c.B {
			r.Ops = append(r.Ops, *c)
		}
	}
	return pairs, nil
}

// compareWeights fills in the sites with how they are stored and how much their weights differ.
func (r *difference) compareWeights(a, b *nn.Network, pairs [][2]*nn.Node, weight func(*nn.Network, *nn.Node) (*tensors.Tensor, error)) error {
	for _, p := range pairs {
		s := siteDifference{A: p[0].Name, B: p[1].Name, Kind: p[0].Op.Kind(), Weight: -1}
		s.StoredA, s.StoredB = p[0].Op.(nn.Linear).Repr().Kind(), p[1].Op.(nn.Linear).Repr().Kind()
		v, errA := weight(a, p[0])
		w, errB := weight(b, p[1])
		if errA == nil && errB == nil && v.Shape().Equal(w.Shape()) {
			if s.Weight = compress.RelativeError(nn.Floats(v), nn.Floats(w)); math.IsInf(s.Weight, 0) || math.IsNaN(s.Weight) {
				s.Weight = math.MaxFloat64
			}
		}
		r.Sites = append(r.Sites, s)
	}
	return nil
}

// compareRun is a run of both networks side by side.
type compareRun struct {
	backend compute.Backend
	a, b    *nn.Network
	pairs   [][2]*nn.Node
	x       compress.Examples
	batch   int
	bar     *progressBar
}

// run compares the outputs of sites and networks, batch by batch.
func (r *difference) run(ctx context.Context, c compareRun) error {
	var taps [2][]string
	for _, p := range c.pairs {
		taps[0], taps[1] = append(taps[0], p[0].Out[0]), append(taps[1], p[1].Out[0])
	}
	var runners [2]*nn.Runner
	for i, net := range []*nn.Network{c.a, c.b} {
		var err error
		if runners[i], err = nn.NewRunner(c.backend, net, nn.RunOptions{Taps: taps[i]}); err != nil {
			return err
		}
		defer runners[i].Finalize()
	}
	diffs, sizes := make([]float64, len(c.pairs)), make([]float64, len(c.pairs))
	var want, got []float32
	width := 0
	for _, from := range batches(c.x.Len(), c.batch) {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(c.batch, c.x.Len()-from)
		in, err := c.x.Slice(from, from+n, c.batch)
		if err != nil {
			return err
		}
		var out [2][]*tensors.Tensor
		for i := range runners {
			if out[i], err = runners[i].Run(in...); err != nil {
				return err
			}
		}
		y, z := firstRows(out[0][0], n), firstRows(out[1][0], n)
		if len(y) != len(z) {
			return fmt.Errorf("%s gives %s and %s gives %s: they do not answer the same question", r.A, out[0][0].Shape(), r.B, out[1][0].Shape())
		}
		want, got = append(want, y...), append(got, z...)
		width = compress.RowWidth(out[0][0].Shape().Dimensions)
		for k := range c.pairs {
			v, w := firstRows(out[0][len(c.a.Outputs)+k], n), firstRows(out[1][len(c.b.Outputs)+k], n)
			if len(v) != len(w) {
				r.Sites[k].Different = fmt.Sprintf("%s and %s", out[0][len(c.a.Outputs)+k].Shape(), out[1][len(c.b.Outputs)+k].Shape())
				continue
			}
			for i := range v {
				e := float64(w[i]) - float64(v[i])
				diffs[k] += e * e
				sizes[k] += float64(v[i]) * float64(v[i])
			}
		}
		c.bar.Set(from+n, c.x.Len())
	}
	for k := range r.Sites {
		s := &r.Sites[k]
		switch {
		case s.Different != "":
			s.Error = -1
			continue
		case diffs[k] == 0:
		case sizes[k] == 0:
			s.Error = math.MaxFloat64
		default:
			s.Error = diffs[k] / sizes[k]
		}
		if r.Parts == "" && s.Error > r.threshold {
			r.Parts = s.A
		}
	}
	for i := range want {
		r.MaxDiff = max(r.MaxDiff, math.Abs(float64(want[i])-float64(got[i])))
	}
	q, err := compress.Judge(want, got, c.x.Len(), width, nil)
	r.Quality, r.Bars, r.Embedding = q.Agreement, q.Bars, compress.Directions(c.a, want, width)
	return err
}

func batches(n, size int) (from []int) {
	for i := range data.Range((n + size - 1) / size) {
		from = append(from, i*size)
	}
	return from
}

// firstRows are the values of the first n cases.
func firstRows(t *tensors.Tensor, n int) []float32 {
	v := nn.Floats(t)
	if s := t.Shape(); s.Rank() > 0 && s.Dimensions[0] > n && s.Dimensions[0] > 0 {
		return v[:len(v)/s.Dimensions[0]*n]
	}
	return v
}

func (r *difference) write(w io.Writer, width int) error {
	fmt.Fprintf(w, "%s and %s on %s\n", r.A, r.B, r.Inputs)
	classes := fmt.Sprintf(", the same is greatest in %s, KL %s nats", pct(r.Quality.Top1), report.Number(r.Quality.KL))
	if r.Embedding {
		classes = ""
	}
	fmt.Fprintf(w, "outputs: cosine %s (%s to %s)%s, largest difference %s\n",
		report.Number(r.Quality.Cosine), report.Number(r.Bars.Cosine.Low), report.Number(r.Bars.Cosine.High), classes, report.Number(r.MaxDiff))
	if r.Parts != "" {
		fmt.Fprintf(w, "they part at %s: the first site whose error passes %g\n", r.Parts, r.threshold)
	} else {
		fmt.Fprintf(w, "no site's error passes %g\n", r.threshold)
	}
	t := report.Table{Title: "Sites, matched " + r.Matched, Columns: []string{"site", "kind", "output error", "weight error", "stored", "in the other"}}
	for i, s := range r.Sites {
		name := s.A
		if s.B != s.A {
			name += " = " + s.B
		}
		e, we := report.Number(s.Error), report.Number(s.Weight)
		if s.Different != "" {
			e = s.Different
		}
		if s.Weight < 0 {
			we = "–"
		}
		if s.A == r.Parts {
			t.Strong = append(t.Strong, i)
		}
		t.Rows = append(t.Rows, []string{name, s.Kind, e, we, s.StoredA, s.StoredB})
	}
	fmt.Fprintln(w)
	if err := report.WriteTable(w, t, width); err != nil {
		return err
	}
	only := func(file string, names []string) {
		if len(names) > 0 {
			fmt.Fprintf(w, "only in %s: %s\n", file, strings.Join(names, ", "))
		}
	}
	only(r.A, r.OnlyA)
	only(r.B, r.OnlyB)
	if len(r.Ops) > 0 {
		slices.SortStableFunc(r.Ops, func(x, y opDifference) int { return cmp.Compare(y.A+y.B, x.A+x.B) })
		var parts []string
		for _, o := range r.Ops {
			parts = append(parts, fmt.Sprintf("%s %d and %d", o.Kind, o.A, o.B))
		}
		fmt.Fprintf(w, "operations that differ in number: %s\n", strings.Join(parts, ", "))
	}
	for _, n := range r.Notes {
		fmt.Fprintln(w, n)
	}
	return nil
}
