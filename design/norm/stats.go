package norm

import (
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// StatRecorder follows how far the statistics of each batch lie from the running ones, norm layer by norm layer, along
// a training: the study behind PowerNorm (arXiv:2003.07845, section 3). Large distances say that running statistics
// are no stand-in for the batch's, and that a norm which trains with one and infers with the other will lose.
//
//	r := norm.NewStatRecorder()
//	restore, err := r.Watch(net)
//	…                                 // train with r.Hook among the hooks that run after a step
//	restore()
//	r.Median(func(p norm.StatPoint) float64 { return p.Relative }, 50, 250)
//
// It watches nn.BatchNorm and the norms of this package that keep running statistics, adds a few reductions per norm and
// step, and changes neither results nor gradients. One recorder serves one network at a time.
type StatRecorder struct {
	asked   []string
	watched []string
	points  map[string][]StatPoint
}

// StatPoint is what one layer did in one step. Batch statistics are those of the step's valid tokens, running ones the
// values before the step's update, d is the number of channels.
type StatPoint struct {
	Step int // from 1

	Mean     float64 // ‖μ_batch − μ_run‖₂/d; 0 for a norm that does not centre
	Var      float64 // ‖σ²_batch − σ²_run‖₂/d; of the quadratic mean ψ² for a norm that does not centre
	Relative float64 // ‖σ²_batch − σ²_run‖₂/‖σ²_run‖₂, or of ψ²
	// Change is ‖s − s'‖₂/‖s'‖₂ of the σ² or ψ² that normalised at this step against the step before; NaN at the first.
	Change float64

	GradMean  float64 // ‖g_μ − its running mean‖₂/d with g = gain·dy and g_μ = mean(g)
	GradScale float64 // ‖g_σ − its running mean‖₂/d with g_σ = mean(g·x̂)
	// GradRelative is the same divided by ‖its running mean‖₂ instead; NaN at the first step.
	GradRelative float64
}

// NewStatRecorder follows the named norm nodes; without names it follows all that keep running statistics.
func NewStatRecorder(layers ...string) *StatRecorder {
	return &StatRecorder{asked: slices.Clone(layers), points: map[string][]StatPoint{}}
}

// normStats are the statistics of one forward pass while training, all [channels] but x̂ and the mask.
type normStats struct {
	mean, runningMean *graph.Node // nil for a norm that does not centre
	scale, running    *graph.Node // σ² or ψ² of the batch, and the running one before its update
	applied           *graph.Node // what normalises
	hat               *graph.Node // x̂ [..., channels]
	mask              *graph.Node // of the tokens, or nil
}

// watchable norms tell their statistics without changing their state.
type watchable interface {
	nn.Norm
	watch(c *nn.Ctx, xs []*graph.Node) normStats
}

// watch tells the quadratic means.
func (d PowerNorm) watch(c *nn.Ctx, xs []*graph.Node) normStats {
	s := d.statistics(c, xs)
	_, mask := tokens(xs)
	return normStats{scale: s.batch, running: s.phi, applied: s.applied, hat: graph.Mul(s.x, perChannel(s.root(s.applied), s.x)), mask: mask}
}

// batchNorm makes nn.BatchNorm watchable.
type batchNorm struct{ nn.BatchNorm }

func (d batchNorm) watch(c *nn.Ctx, xs []*graph.Node) normStats {
	x, mask := tokens(xs)
	mean, _ := channelMean(x, mask)
	centred := graph.Sub(x, perChannel(mean, x))
	variance, _ := channelMean(graph.Mul(centred, centred), mask)
	hat := graph.Div(centred, perChannel(graph.Sqrt(graph.AddScalar(variance, d.Epsilon())), x))
	return normStats{mean: mean, runningMean: c.P("mean"), scale: variance, running: c.P("var"), applied: variance, hat: hat, mask: mask}
}

// The state that watching adds to a node: last step's applied statistic and the running backward ones.
var watchState = []string{"watch.applied", "watch.gradmean", "watch.gradscale"}

// Watch makes the network's norms report, until restore is called: then they are what they were, with what they have
// learned. A trainer must be made in between and not be used after restore. It fails on a name that is no such norm, and
// when there is none at all.
func (r *StatRecorder) Watch(n *nn.Network) (restore func(), err error) {
	r.watched = nil
	var undo []func()
	restore = func() {
		for _, f := range undo {
			f()
		}
		undo = nil
	}
	for _, x := range n.Nodes {
		op, ok := x.Op.(watchable)
		if bn, is := x.Op.(nn.BatchNorm); is && !bn.Always {
			op, ok = batchNorm{bn}, true
		}
		if !ok || (len(r.asked) > 0 && !slices.Contains(r.asked, x.Name)) {
			continue
		}
		channels, old := channelsOf(n, x), x.Op
		for _, s := range watchState {
			full := x.Name + "." + s
			if channels == 0 || n.Params.Get(full) != nil {
				restore()
				return nil, fmt.Errorf("norm: watch: node %q has no running statistics, or is watched already", x.Name)
			}
			n.Params.Put(&nn.Param{Name: full, Role: nn.State, Value: tensors.FromFlatDataAndDimensions(make([]float32, channels), channels)})
			x.P[s] = full
			undo = append(undo, func() { n.Params.Delete(full); delete(x.P, s) })
		}
		x.Op = watched{op, x.Name}
		undo = append(undo, func() { x.Op = old })
		r.watched = append(r.watched, x.Name)
	}
	for _, name := range r.asked {
		if !slices.Contains(r.watched, name) {
			restore()
			return nil, fmt.Errorf("norm: watch: %q is no norm with running statistics", name)
		}
	}
	if len(r.watched) == 0 {
		return nil, fmt.Errorf("norm: watch: the network has no norm with running statistics, such as batch norm or PowerNorm")
	}
	return restore, nil
}

// channelsOf is the size of the largest state of a norm, which is that of its channels.
func channelsOf(n *nn.Network, x *nn.Node) (channels int) {
	for _, p := range x.P {
		if q := n.Params.Get(p); q != nil && q.Role == nn.State && q.Value.Rank() == 1 {
			channels = max(channels, q.Value.Shape().Size())
		}
	}
	return channels
}

// watched is a norm that reports.
type watched struct {
	watchable
	name string
}

// statNames are the reported figures in the order of StatPoint.
var statNames = []string{"mean", "var", "relative", "change", "gradmean", "gradscale"}

func statKey(layer, figure string) string { return "norm/" + layer + "/" + figure }

// Lower is the norm's, and the figures beside it.
func (d watched) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	if !c.Training {
		return d.watchable.Lower(c, xs)
	}
	s := d.watch(c, xs)
	old := make([]*graph.Node, len(watchState))
	for i, name := range watchState {
		old[i] = exactState(c, name, s.scale.DType())
	}
	y := d.watchable.Lower(c, xs)[0]
	channels := float64(s.scale.Shape().Size())
	report := func(figure string, v *graph.Node) { learn.Report(c.Env, statKey(d.name, figure), v) }
	if s.mean != nil {
		report("mean", graph.DivScalar(distance(s.mean, s.runningMean), channels))
	}
	report("var", graph.DivScalar(distance(s.scale, s.running), channels))
	report("relative", graph.Div(distance(s.scale, s.running), length(s.running)))
	report("change", graph.Div(distance(s.applied, old[0]), length(old[0])))
	c.Set(watchState[0], s.applied)
	y = graph.IdentityWithCustomGradient(y, func(_, dy *graph.Node) *graph.Node {
		g := dy
		if w := c.P("w"); w != nil {
			g = graph.Mul(dy, perChannel(w, dy))
		}
		g = graph.ConvertDType(g, s.hat.DType())
		mean, _ := channelMean(g, s.mask)
		scale, _ := channelMean(graph.Mul(g, s.hat), s.mask)
		for i, v := range []*graph.Node{mean, scale} {
			report(statNames[4+i], graph.DivScalar(distance(v, old[1+i]), channels))
			if i == 1 {
				report("gradrelative", graph.Div(distance(v, old[1+i]), length(old[1+i])))
			}
			c.Set(watchState[1+i], mix(old[1+i], v, .9))
		}
		return dy
	})
	return []*graph.Node{y}
}

// length is ‖v‖₂, and distance ‖a − b‖₂.
func length(v *graph.Node) *graph.Node      { return graph.Sqrt(graph.ReduceAllSum(graph.Mul(v, v))) }
func distance(a, b *graph.Node) *graph.Node { return length(graph.Sub(a, b)) }

// Hook takes the figures of a step; it is a learn.Hook for after the steps.
func (r *StatRecorder) Hook(_ *learn.Trainer, info learn.Info) error {
	for _, layer := range r.watched {
		if _, ok := info.Metrics[statKey(layer, "var")]; !ok {
			return fmt.Errorf("norm: step %d reports nothing of %q: the trainer was made before Watch", info.Step, layer)
		}
		at := func(figure string) float64 { return info.Metrics[statKey(layer, figure)] }
		p := StatPoint{Step: info.Step, Mean: at("mean"), Var: at("var"), Relative: at("relative"), Change: at("change"), GradMean: at("gradmean"), GradScale: at("gradscale"), GradRelative: at("gradrelative")}
		if math.IsInf(p.Change, 0) {
			p.Change = math.NaN() // there was no step before
		}
		if math.IsInf(p.GradRelative, 0) {
			p.GradRelative = math.NaN()
		}
		r.points[layer] = append(r.points[layer], p)
	}
	return nil
}

// Layers are the watched norms in the network's order.
func (r *StatRecorder) Layers() []string { return slices.Clone(r.watched) }

// Points are the figures of a layer, in order of the steps.
func (r *StatRecorder) Points(layer string) []StatPoint { return slices.Clone(r.points[layer]) }

// Median is the median of a figure over all layers and the steps from and to, both included; NaN without any.
func (r *StatRecorder) Median(figure func(StatPoint) float64, from, to int) float64 {
	var all []float64
	for _, layer := range r.watched {
		for _, p := range r.points[layer] {
			if v := figure(p); p.Step >= from && p.Step <= to && !math.IsNaN(v) {
				all = append(all, v)
			}
		}
	}
	if len(all) == 0 {
		return math.NaN()
	}
	return stat.Median(all)
}
