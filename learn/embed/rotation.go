// Package embed turns pictures into vectors that need no labels: frozen embedders for clustering, retrieval and data
// selection.
package embed

import (
	"context"
	"fmt"
	"math"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"
	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// Embedder maps every picture to a row of length 1.
type Embedder interface {
	Embed(ctx context.Context, m *data.Images) (*mat.Dense, error) // [N, dim]
}

var _ Embedder = (*Rotation)(nil)

// Rotation embeds pictures by a small convolutional network that learnt, without labels, by how many quarter turns a
// picture is rotated (RotNet, Gidaris et al., arXiv:1803.07728): telling a shoe that stands from one that lies takes
// knowing what a shoe looks like. It suits pictures that have an upright; textures and aerial views have none.
type Rotation struct {
	b      compute.Backend
	net    *nn.Network
	size   [3]int // height, width, channels
	dim    int
	runner *nn.Runner
}

// RotationOptions describe the network and its training. The zero value takes seconds on some thousand small pictures.
type RotationOptions struct {
	Dim    int     // length of an embedding; 0: 32
	Epochs int     // passes over the pictures, each in all four rotations; 0: 3
	Batch  int     // pictures per step, before rotation; 0: 50
	LR     float64 // of AdamW, along half a cosine; 0: 2e-3
	Seed   uint64
	// Progress is called after every step; nil: not.
	Progress func(done, total int) `json:"-"`
}

func (o RotationOptions) withDefaults() RotationOptions {
	if o.Dim == 0 {
		o.Dim = 32
	}
	if o.Epochs == 0 {
		o.Epochs = 3
	}
	if o.Batch == 0 {
		o.Batch = 50
	}
	if o.LR == 0 {
		o.LR = 2e-3
	}
	return o
}

// featureNode is the value that is the embedding before it is normalised.
const featureNode = "feature"

// RotationNetwork builds the untrained network for square pictures of the given side: 3×3 convolutions of 16, 32 and 32
// channels (the last two of stride 2), a dense layer of Dim features, and a head of four logits. Input "image".
func RotationNetwork(side, channels int, o RotationOptions) (*nn.Network, error) {
	o = o.withDefaults()
	if side < 4 || channels < 1 || o.Dim < 1 {
		return nil, fmt.Errorf("embed: pictures of %d×%d×%d, %d features; want a side of at least 4, and at least one channel and feature", side, side, channels, o.Dim)
	}
	b := nn.NewBuilder(o.Seed)
	x := b.Image("image", side, side, channels)
	in := channels
	for i, out := range []int{16, 32, 32} {
		stride := 2
		if i == 0 {
			stride = 1
		}
		c := nn.Conv2D(out, 3, stride)
		c.W = nn.Plain{Init: nn.FanIn(9*in, math.Sqrt2)}
		x = b.Add(fmt.Sprintf("act%d", i), nn.ReLU, b.Add(fmt.Sprintf("conv%d", i), c, x))
		in = out
	}
	x = b.Add("flat", nn.Reshape{Dims: []int{0, -1}}, x)
	x = b.Add(featureNode, nn.Dense{Out: o.Dim}, x)
	return b.Finish(b.Add("head", nn.Dense{Out: 4}, b.Add("act3", nn.ReLU, x)))
}

// TrainRotation trains a network of RotationNetwork in place on square pictures.
func TrainRotation(ctx context.Context, b compute.Backend, net *nn.Network, m *data.Images, o RotationOptions) error {
	o = o.withDefaults()
	if m.N == 0 || m.H != m.W {
		return fmt.Errorf("embed: %d pictures of %d×%d; rotations need square ones, and at least one", m.N, m.W, m.H)
	}
	if o.Epochs < 1 || o.Batch < 1 || !(o.LR > 0) {
		return fmt.Errorf("embed: %d epochs, batch %d, rate %g; all must be positive", o.Epochs, o.Batch, o.LR)
	}
	order, err := data.NewBatcher(m.N, min(o.Batch, m.N), o.Seed)
	if err != nil {
		return err
	}
	steps := o.Epochs * order.StepsPerEpoch()
	loss := func(env *nn.Env, batch []*graph.Node) *graph.Node {
		return learn.CrossEntropy(net.Lower(env, map[string]*graph.Node{"image": batch[0]})[0], batch[1])
	}
	tr, err := learn.NewTrainer(b, &net.Params, loss, learn.Options{Optimizer: optim.AdamW{Decay: 1e-2}, LR: o.LR, Schedule: optim.Cosine(steps, min(20, steps/10), 0), Seed: o.Seed})
	if err != nil {
		return err
	}
	defer tr.Finalize()
	fit := learn.FitOptions{Steps: steps, Batch: func(step int) ([]*tensors.Tensor, error) { return rotations(m, order.At(step)), nil }}
	if o.Progress != nil {
		fit.Progress = func(done, total int, _ learn.Info) { o.Progress(done, total) }
	}
	_, err = tr.Fit(ctx, fit)
	return err
}

// rotations returns the pictures in all four rotations, [4·len(idx), H, W, C], and by how many quarter turns.
func rotations(m *data.Images, idx []int) []*tensors.Tensor {
	side, c := m.H, m.C
	size := side * side * c
	upright := m.Floats(idx, nil)
	out, turns := make([]float32, 4*len(upright)), make([]int32, 4*len(idx))
	for k := range idx {
		from := upright[k*size : (k+1)*size]
		for r := range 4 {
			to := out[(4*k+r)*size : (4*k+r+1)*size]
			turns[4*k+r] = int32(r)
			for y := range side {
				for x := range side {
					sy, sx := y, x
					for range r { // a quarter turn clockwise takes (y, x) from (side-1-x, y)
						sy, sx = side-1-sx, sy
					}
					copy(to[(y*side+x)*c:(y*side+x+1)*c], from[(sy*side+sx)*c:(sy*side+sx+1)*c])
				}
			}
		}
	}
	return []*tensors.Tensor{
		tensors.FromFlatDataAndDimensions(out, 4*len(idx), side, side, c),
		tensors.FromFlatDataAndDimensions(turns, 4*len(idx)),
	}
}

// NewRotation wraps a trained network of RotationNetwork. Close it after use.
func NewRotation(b compute.Backend, net *nn.Network) (*Rotation, error) {
	sh, err := net.Shapes(1)
	if err != nil {
		return nil, err
	}
	in, f := sh["image"], sh[featureNode]
	if in.Rank() != 4 || f.Rank() != 2 {
		return nil, fmt.Errorf("embed: the network has no input %q with a value %q; RotationNetwork builds one", "image", featureNode)
	}
	r := &Rotation{b: b, net: net, size: [3]int(in.Dimensions[1:]), dim: f.Dimensions[1]}
	r.runner, err = nn.NewRunner(b, net, nn.RunOptions{Taps: []string{featureNode}})
	return r, err
}

// Dim is the length of an embedding.
func (r *Rotation) Dim() int { return r.dim }

// Close frees the compiled network.
func (r *Rotation) Close() { r.runner.Finalize() }

// Accuracy is the share of rotations that the network tells apart, over all four of every picture: 0.25 by guessing.
func (r *Rotation) Accuracy(ctx context.Context, m *data.Images) (float64, error) {
	if err := r.fits(m); err != nil {
		return 0, err
	}
	right := 0
	for idx := range data.Batches(m.N, 100) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		batch := rotations(m, idx)
		out, err := r.runner.Run(batch[0])
		if err != nil {
			return 0, err
		}
		logits := nn.Floats(out[0])
		for i := range 4 * len(idx) {
			best := 0
			for c := range 4 {
				if logits[4*i+c] > logits[4*i+best] {
					best = c
				}
			}
			if best == i%4 {
				right++
			}
		}
	}
	return float64(right) / float64(4*m.N), nil
}

func (r *Rotation) fits(m *data.Images) error {
	if m.N == 0 || m.H != r.size[0] || m.W != r.size[1] || m.C != r.size[2] {
		return fmt.Errorf("embed: %d pictures of %d×%d×%d; the network takes %d×%d×%d", m.N, m.W, m.H, m.C, r.size[1], r.size[0], r.size[2])
	}
	return nil
}

// Embed returns the unit embeddings of the pictures. A picture without any feature (which random weights make
// improbable) is an error.
func (r *Rotation) Embed(ctx context.Context, m *data.Images) (*mat.Dense, error) {
	if err := r.fits(m); err != nil {
		return nil, err
	}
	out := mat.NewDense(m.N, r.dim, nil)
	for idx := range data.Batches(m.N, 250) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		x, err := m.Float32(idx)
		if err != nil {
			return nil, err
		}
		v, err := r.runner.Run(x)
		if err != nil {
			return nil, err
		}
		f := nn.Floats(v[1])
		for k, i := range idx {
			row := f[k*r.dim : (k+1)*r.dim]
			norm := 0.
			for _, a := range row {
				norm += float64(a) * float64(a)
			}
			if norm = math.Sqrt(norm); !(norm > 0) || math.IsInf(norm, 0) {
				return nil, fmt.Errorf("embed: the features of picture %d have length %g", i, norm)
			}
			for j, a := range row {
				out.Set(i, j, float64(a)/norm)
			}
		}
	}
	return out, nil
}
