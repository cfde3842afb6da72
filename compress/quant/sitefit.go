package quant

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// SiteFitter optimises a site, with whatever quantises its weight and its input, so that its output comes close to given
// ones: the inner loop of the quantisers that reconstruct layer by layer. What it compiles for a site serves all sites of
// the same operations and shapes, as long as there were not too many others in between. Close frees it.
type SiteFitter struct {
	b    compute.Backend
	fits []*compiledFit // the most recently used last
}

// maxFits is how many compiled fits are kept, enough for the layers of a repeated block, and maxFitBytes what they may hold
// for passes over a batch, the one in use aside.
const (
	maxFits     = 8
	maxFitBytes = 1 << 30
)

// NewSiteFitter prepares fits on a backend.
func NewSiteFitter(b compute.Backend) *SiteFitter {
	return &SiteFitter{b: b}
}

// Close frees the compiled graphs.
func (f *SiteFitter) Close() {
	for _, c := range f.fits {
		c.close()
	}
	f.fits = nil
}

func (c *compiledFit) close() {
	c.trainer.Finalize()
	c.errors.Finalize()
}

// SiteFit says how a site is fitted: Adam (0.9, 0.999, 1e-8) on the mean squared error of the outputs.
type SiteFit struct {
	Iterations int                // updates; 0: none
	Batch      int                // cases per update, drawn anew for each; 0, or as many as there are: all of them
	Rates      map[string]float64 // learning rate of each parameter that moves, by its name in the site's network
	KeepBest   bool               // look at the loss over all cases now and then, and keep the best parameters seen
	Seed       uint64             // of the draw of cases
	DType      dtypes.DType       // of the computation and the parameters; 0: float32
}

// FitTrace is how a fit went.
type FitTrace struct {
	Loss       []float64 // on the cases of each update, before it
	Start, End float64   // over all cases, with the parameters before the first update and with those that are kept
	Kept       int       // updates after which the kept parameters stood
}

// looks is how often a fit with KeepBest looks at all cases.
const looks = 5

// Fit changes the parameters of site, a network of one input and one output, so that from x [cases, ...] it gives y
// [cases, ...]. Networks whose nodes and parameters have the same names, operations and shapes share what is compiled.
// Errors: shapes that do not fit; values that are not finite; learn.ErrDiverged when the loss is no number any more and
// KeepBest is off.
func (f *SiteFitter) Fit(ctx context.Context, site *nn.Network, x, y *tensors.Tensor, o SiteFit) (FitTrace, error) {
	var tr FitTrace
	n := x.Shape().Dimensions[0]
	if n == 0 || y.Shape().Rank() == 0 || y.Shape().Dimensions[0] != n {
		return tr, fmt.Errorf("quant: fit: inputs %s and outputs %s are not of the same cases", x.Shape(), y.Shape())
	}
	if o.Iterations < 0 || o.Batch < 0 {
		return tr, fmt.Errorf("quant: fit: %d iterations on %d cases; want at least 0", o.Iterations, o.Batch)
	}
	if o.Batch == 0 || o.Batch > n {
		o.Batch = n
	}
	c, err := f.compiled(site, x, y, o)
	if err != nil {
		return tr, err
	}
	if err := c.net.Params.CopyFrom(&site.Params); err != nil {
		return tr, fmt.Errorf("quant: fit: %w", err)
	}
	if err := c.trainer.Reset(o.Seed); err != nil {
		return tr, err
	}
	if tr.Start, err = c.loss(ctx, x, y, o.Batch); err != nil {
		return tr, err
	}
	if !finite(tr.Start) {
		return tr, fmt.Errorf("quant: fit: the error of the outputs is %g: %w", tr.Start, ErrNotFinite)
	}
	best := tr.Start
	look := func(done int) error {
		l, err := c.loss(ctx, x, y, o.Batch)
		if err != nil {
			return err
		}
		if tr.End = l; o.KeepBest && !(l < best) {
			return nil
		}
		best, tr.Kept = l, done
		return site.Params.CopyFrom(&c.net.Params)
	}
	draw := rng.New(o.Seed, "site-fit")
	for i := range o.Iterations {
		if err := ctx.Err(); err != nil {
			return tr, err
		}
		batch := []*tensors.Tensor{x, y}
		if o.Batch < n {
			batch = append(batch, caseNumbers(draw.Perm(n)[:o.Batch]))
		}
		info, err := c.trainer.Step(batch...)
		if err != nil {
			return tr, err
		}
		tr.Loss = append(tr.Loss, info.Loss)
		if !finite(info.Loss) {
			if o.KeepBest {
				break
			}
			return tr, fmt.Errorf("quant: fit: iteration %d: %w; lower the learning rates", i+1, learn.ErrDiverged)
		}
		if every := max(1, o.Iterations/looks); i+1 == o.Iterations || o.KeepBest && (i+1)%every == 0 {
			if err := look(i + 1); err != nil {
				return tr, err
			}
		}
	}
	if o.Iterations == 0 || o.KeepBest {
		tr.End = best
	}
	if !finite(tr.End) {
		return tr, fmt.Errorf("quant: fit: the error after the last iteration is %g: %w; lower the learning rates", tr.End, learn.ErrDiverged)
	}
	return tr, nil
}

func finite(v float64) bool { return v-v == 0 }

// compiledFit is what one kind of site has been compiled into; its parameters are those of the site under way.
type compiledFit struct {
	key     string
	bytes   int64 // what its passes hold
	net     *nn.Network
	names   []string
	trainer *learn.Trainer
	errors  *engine.Exec // parameters, x, y, cases -> the sum of squared differences of each case
}

func (f *SiteFitter) compiled(site *nn.Network, x, y *tensors.Tensor, o SiteFit) (*compiledFit, error) {
	if len(site.Inputs) != 1 || len(site.Outputs) != 1 {
		return nil, fmt.Errorf("quant: fit: a network of %d inputs and %d outputs; want one of each", len(site.Inputs), len(site.Outputs))
	}
	key := fitKey(site, x, y, o)
	if i := slices.IndexFunc(f.fits, func(c *compiledFit) bool { return c.key == key }); i >= 0 {
		c := f.fits[i]
		f.fits = append(slices.Delete(f.fits, i, i+1), c)
		return c, nil
	}
	fitted := site.Nodes[len(site.Nodes)-1].Op
	c := &compiledFit{key: key, net: site.Clone(), bytes: fitBytes(fitted, x.Shape(), y.Shape(), o.Batch, len(site.Nodes) > 1)}
	for p := range c.net.Params.All() {
		c.names = append(c.names, p.Name)
	}
	for name := range o.Rates {
		if c.net.Params.Get(name) == nil {
			return nil, fmt.Errorf("quant: fit: a rate is given for %q; the site's parameters are %s", name, strings.Join(c.names, ", "))
		}
	}
	// All cases stay where the backend has them; which of them count is picked inside the graph.
	squares := func(env *nn.Env, batch []*graph.Node) *graph.Node {
		in, want := batch[0], batch[1]
		if len(batch) > 2 {
			in, want = graph.Gather(in, batch[2]), graph.Gather(want, batch[2])
		}
		got := c.net.Lower(env, map[string]*graph.Node{c.net.Inputs[0].Name: in})[0]
		if !got.Shape().Equal(want.Shape()) {
			panic(fmt.Errorf("the site gives %s, the wanted outputs are %s", got.Shape(), want.Shape()))
		}
		d := graph.Sub(got, want)
		return graph.Mul(d, d)
	}
	var err error
	c.trainer, err = learn.NewTrainer(f.b, &c.net.Params, func(env *nn.Env, batch []*graph.Node) *graph.Node {
		return graph.ReduceAllMean(squares(env, batch))
	}, learn.Options{
		Optimizer: optim.AdamW{}, LR: 1, DType: o.DType,
		Factors: func(p *nn.Param) learn.Factors { return learn.Factors{LR: o.Rates[p.Name]} },
	})
	if err != nil {
		return nil, fmt.Errorf("quant: fit: %w", err)
	}
	c.errors, err = engine.NewExec(f.b, func(in []*graph.Node) []*graph.Node {
		cur := map[string]*graph.Node{}
		for i, name := range c.names {
			cur[name] = in[i]
		}
		env := &nn.Env{G: in[0].Graph(), DType: o.DType, Param: func(s string) *graph.Node { return cur[s] }}
		s := squares(env, in[len(c.names):])
		cases := s.Shape().Dimensions[0]
		return []*graph.Node{graph.ReduceSum(graph.Reshape(s, cases, s.Shape().Size()/cases), 1)}
	})
	if err != nil {
		return nil, err
	}
	c.errors.NoLimit()
	gone := surplusFits(f.fits, c.bytes, func(c *compiledFit) int64 { return c.bytes })
	for _, old := range f.fits[:gone] {
		old.close()
	}
	f.fits = append(slices.Delete(f.fits, 0, gone), c)
	return c, nil
}

// surplusFits is how many fits, the oldest first, make room for one of so many bytes.
func surplusFits[F any](fits []F, coming int64, bytes func(F) int64) (gone int) {
	held := coming
	for _, f := range fits {
		held += bytes(f)
	}
	for ; gone < len(fits) && (len(fits)-gone >= maxFits || held > maxFitBytes); gone++ {
		held -= bytes(fits[gone])
	}
	return gone
}

// fitBytes is what the two passes of a compiled fit hold of a batch in float32, on the native backend. The one that measures
// has x, y and the site's output; that of an update has in place of x four such values where the input is quantised (its
// codes and what their gradient is masked by, before and after), and the gradient in place of the output. A convolution with
// zeros around its input has it once more in both.
func fitBytes(op nn.Op, x, y shapes.Shape, batch int, quantised bool) int64 {
	cases := int64(max(x.Dimensions[0], 1))
	of := func(bytes int64) int64 { return bytes / cases * int64(batch) }
	ofX := int64(2)
	if quantised {
		ofX = 5
	}
	n := ofX*of(int64(x.ByteSize())) + 4*of(int64(y.ByteSize()))
	if c, ok := op.(nn.Conv); ok {
		n += 2 * of(compress.PaddedBytes(c, x))
	}
	return n
}

// fitKey names what a fit compiles.
func fitKey(site *nn.Network, x, y *tensors.Tensor, o SiteFit) string {
	var s strings.Builder
	fmt.Fprintf(&s, "%v %v %v %s %v %v\n", site.Inputs[0].Name, x.Shape().Dimensions, y.Shape().Dimensions, site.Outputs[0], o.Batch, o.DType)
	for _, n := range site.Nodes {
		fmt.Fprintf(&s, "%s %#v %q %q %q\n", n.Name, n.Op, n.In, n.Out, n.P)
	}
	for p := range site.Params.All() {
		fmt.Fprintf(&s, "%s %v %v %v\n", p.Name, p.Value.Shape(), p.Trainable(), o.Rates[p.Name])
	}
	return s.String()
}

// caseNumbers are indices [cases, 1] for a gather.
func caseNumbers(idx []int) *tensors.Tensor {
	v := make([]int32, len(idx))
	for i, k := range idx {
		v[i] = int32(k)
	}
	return tensors.FromFlatDataAndDimensions(v, len(v), 1)
}

// loss is the mean squared error over all cases, in passes of one size.
func (c *compiledFit) loss(ctx context.Context, x, y *tensors.Tensor, batch int) (float64, error) {
	n, sum := x.Shape().Dimensions[0], 0.
	for from := 0; from < n; from += batch {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		args := make([]any, 0, len(c.names)+3)
		for _, name := range c.names {
			args = append(args, c.net.Params.Get(name).Value)
		}
		args = append(args, x, y)
		if batch < n {
			idx := make([]int, batch)
			for k := range idx {
				idx[k] = min(from+k, n-1) // the last pass is filled up; only its first cases count
			}
			args = append(args, caseNumbers(idx))
		}
		out, err := c.errors.Call(args...)
		if err != nil {
			return 0, fmt.Errorf("quant: fit: %w", err)
		}
		for _, v := range nn.Float64s(out[0])[:min(batch, n-from)] {
			sum += v
		}
	}
	return sum / float64(y.Shape().Size()), nil
}
