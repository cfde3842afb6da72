package detect

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// stride is the size in pixels of the cells that a Detector divides its pictures into.
const stride = 4

// DetectorConfig describes a Detector. Its zero value finds the ten Fashion-MNIST classes in grey 96x96 scenes.
type DetectorConfig struct {
	Height, Width int   // of the pictures, multiples of 4; 0: 96
	Channels      int   // 1 for grey, 3 for RGB; 0: 1
	Classes       int   // 0: 10
	Widths        []int // channels of the convolutions, at least two; nil: 16, 32, 64, 64
}

func (c DetectorConfig) resolved() (DetectorConfig, error) {
	c.Height, c.Width = cmp.Or(c.Height, 96), cmp.Or(c.Width, 96)
	c.Channels, c.Classes = cmp.Or(c.Channels, 1), cmp.Or(c.Classes, 10)
	if c.Widths == nil {
		c.Widths = []int{16, 32, 64, 64}
	}
	switch {
	case c.Height < stride || c.Width < stride || c.Height%stride != 0 || c.Width%stride != 0:
		return c, fmt.Errorf("detect: pictures of %dx%d; height and width must be multiples of %d", c.Height, c.Width, stride)
	case c.Channels < 1 || c.Classes < 1:
		return c, fmt.Errorf("detect: %d channels and %d classes; want at least 1 of each", c.Channels, c.Classes)
	case len(c.Widths) < 2 || slices.Min(c.Widths) < 1:
		return c, fmt.Errorf("detect: widths %v; want at least two convolutions of at least one channel", c.Widths)
	}
	return c, nil
}

// Detector is a small one-stage, anchor-free detector: 3x3 convolutions with batch norm and ReLU, of which the first
// two have stride 2, and a 3x3 head that gives each 4x4-pixel cell a logit per class and four values o, whose
// exp(o)·4 are the distances in pixels from the cell's centre to the left, upper, right and lower side of the box
// (as in FCOS, arXiv:1904.01355). It learns classes by focal loss (arXiv:1708.02002, alpha 0.25, gamma 2) and boxes by
// GIoU (arXiv:1902.09630). With its default widths it has about 70,000 parameters.
//
// Its raw boxes overlap; pass them to Suppress.
type Detector struct {
	DetectorConfig
	// Net maps pictures [batch, height, width, channels] in [0, 1] to [batch, height/4, width/4, classes+4].
	Net *nn.Network
}

// NewDetector builds an untrained detector; its parameters are drawn under seed.
func NewDetector(cfg DetectorConfig, seed uint64) (*Detector, error) {
	cfg, err := cfg.resolved()
	if err != nil {
		return nil, err
	}
	b := nn.NewBuilder(seed)
	x := b.Image("image", cfg.Height, cfg.Width, cfg.Channels)
	for i, width := range cfg.Widths {
		conv := nn.Conv2D(width, 3, 1)
		if i < 2 {
			conv = nn.Conv2D(width, 3, 2)
		}
		conv.NoBias = true
		b.In(fmt.Sprintf("block%d", i+1), func() {
			x = b.Add("conv", conv, x)
			x = b.Add("norm", nn.BatchNorm{}, x)
			x = b.Add("act", nn.ReLU, x)
		})
	}
	x = b.Add("head", nn.Conv2D(cfg.Classes+4, 3, 1), x)
	bias := make([]float32, cfg.Classes+4)
	for i := range cfg.Classes {
		bias[i] = float32(-math.Log(99)) // every class starts at a probability of 1 %
	}
	b.Set("head", "b", tensors.FromFlatDataAndDimensions(bias, len(bias)))
	net, err := b.Finish(x)
	if err != nil {
		return nil, fmt.Errorf("detect: %w", err)
	}
	if w := net.Param(net.Node("head"), "w"); w != nil { // a small head keeps the prior
		d := w.Data()
		for i := range d {
			d[i] *= 0.1
		}
		if err := w.SetData(d); err != nil {
			return nil, fmt.Errorf("detect: %w", err)
		}
	}
	return &Detector{cfg, net}, nil
}

// TrainOptions say how a Detector learns.
type TrainOptions struct {
	Steps int     // 0: 1500
	Batch int     // scenes per step; 0: 16
	LR    float64 // of Adam, falling to 0 along a half cosine; 0: 2e-3
	Seed  uint64  // of the order of the scenes

	Checkpoint string // file to resume from after an interruption; "": none
	Progress   func(done, total int, info learn.Info)
}

// Train fits the detector to labelled scenes. It returns what the last step reported: the loss, and its parts "focal"
// and "giou". When ctx ends it saves its checkpoint, if one is named, and returns ctx's error.
func (d *Detector) Train(ctx context.Context, b compute.Backend, scenes []Scene, o TrainOptions) (learn.Info, error) {
	o.Steps, o.Batch, o.LR = cmp.Or(o.Steps, 1500), cmp.Or(o.Batch, 16), cmp.Or(o.LR, 2e-3)
	for i, s := range scenes {
		if err := d.check(s); err != nil {
			return learn.Info{}, fmt.Errorf("detect: scene %d: %w", i, err)
		}
	}
	order, err := data.NewBatcher(len(scenes), o.Batch, o.Seed)
	if err != nil {
		return learn.Info{}, fmt.Errorf("detect: %w", err)
	}
	perEpoch := order.StepsPerEpoch()
	t, err := learn.NewTrainer(b, &d.Net.Params, d.Loss, learn.Options{
		Optimizer: optim.AdamW{}, LR: o.LR, Schedule: optim.Cosine(o.Steps, 0, 0), Seed: o.Seed,
	})
	if err != nil {
		return learn.Info{}, err
	}
	defer t.Finalize()
	return t.Fit(ctx, learn.FitOptions{
		Steps: o.Steps, Checkpoint: o.Checkpoint, Progress: o.Progress,
		Batch: func(step int) ([]*tensors.Tensor, error) {
			err := order.Restore(data.BatcherState{
				N: len(scenes), Seed: o.Seed, Epoch: step / perEpoch, Position: step % perEpoch * o.Batch, Shuffled: true,
			})
			if err != nil {
				return nil, err
			}
			return d.batch(scenes, order.Next()), nil
		},
	})
}

func (d *Detector) check(s Scene) error {
	if n := d.Height * d.Width * d.Channels; len(s.Pixels) != n {
		return fmt.Errorf("%d pixel values; a picture of %dx%dx%d has %d (SceneFrom scales pictures)", len(s.Pixels), d.Height, d.Width, d.Channels, n)
	}
	for i, o := range s.Objects {
		if o.Class < 0 || o.Class >= d.Classes {
			return fmt.Errorf("object %d: class %d is not in 0..%d", i, o.Class, d.Classes-1)
		}
		if err := o.Box.check(); err != nil {
			return fmt.Errorf("object %d: %w", i, err)
		}
	}
	return nil
}

// batch gives pictures [n, H, W, C], the class of every cell [n, h, w] (-1 where there is no object) and its distances
// to the sides of its box in pixels [n, h, w, 4].
func (d *Detector) batch(scenes []Scene, idx []int) []*tensors.Tensor {
	h, w := d.Height/stride, d.Width/stride
	pixels := make([]float32, 0, len(idx)*d.Height*d.Width*d.Channels)
	class, side := make([]int32, len(idx)*h*w), make([]float32, len(idx)*h*w*4)
	for k, i := range idx {
		pixels = append(pixels, scenes[i].Pixels...)
		d.assign(scenes[i].Objects, class[k*h*w:(k+1)*h*w], side[k*h*w*4:(k+1)*h*w*4])
	}
	return []*tensors.Tensor{
		tensors.FromFlatDataAndDimensions(pixels, len(idx), d.Height, d.Width, d.Channels),
		tensors.FromFlatDataAndDimensions(class, len(idx), h, w),
		tensors.FromFlatDataAndDimensions(side, len(idx), h, w, 4),
	}
}

// assign gives a cell the object whose central half, in both directions, holds the cell's centre: the smallest one.
func (d *Detector) assign(objects []Object, class []int32, side []float32) {
	w := d.Width / stride
	for i := range class {
		class[i] = -1
		cx, cy := centre(i, w)
		smallest := math.Inf(1)
		for c := range 4 {
			side[4*i+c] = 1 // any box: the loss leaves it out
		}
		for _, o := range objects {
			b := o.Box
			if math.Abs(cx-b.X-b.W/2) > b.W/4 || math.Abs(cy-b.Y-b.H/2) > b.H/4 || b.Area() >= smallest || b.Area() == 0 {
				continue
			}
			smallest, class[i] = b.Area(), int32(o.Class)
			for c, v := range [4]float64{cx - b.X, cy - b.Y, b.X + b.W - cx, b.Y + b.H - cy} {
				side[4*i+c] = float32(v)
			}
		}
	}
}

// centre of a cell, in pixels, for rows of w cells.
func centre(cell, w int) (x, y float64) {
	return (float64(cell%w) + 0.5) * stride, (float64(cell/w) + 0.5) * stride
}

// Loss is the focal loss of all cells and classes over the number of object cells, plus the mean of 1-GIoU over these.
// The batch is what Train makes: pictures, classes and sides of the cells.
func (d *Detector) Loss(env *nn.Env, batch []*graph.Node) *graph.Node {
	image, class, side := batch[0], batch[1], batch[2]
	out := d.Net.Lower(env, map[string]*graph.Node{"image": image})[0]
	logits := graph.Slice(out, graph.AxisRange(), graph.AxisRange(), graph.AxisRange(), graph.AxisRange(0, d.Classes))
	raw := graph.Slice(out, graph.AxisRange(), graph.AxisRange(), graph.AxisRange(), graph.AxisRange(d.Classes))
	positive := graph.ConvertDType(graph.GreaterOrEqual(class, graph.ZerosLike(class)), out.DType()) // [n, h, w]
	count := graph.MaxScalar(graph.ReduceAllSum(positive), 1)

	// -alpha_t (1-p_t)^gamma log p_t, with log p = -softplus(-x) and log(1-p) = -softplus(x)
	const alpha = 0.25
	// A class of -1 matches no index.
	index := graph.Iota(image.Graph(), shapes.Make(class.DType(), logits.Shape().Dimensions...), 3)
	is := graph.ConvertDType(graph.Equal(index, graph.BroadcastToDims(graph.InsertAxes(class, -1), logits.Shape().Dimensions...)), out.DType())
	not := graph.OneMinus(is)
	p := graph.Sigmoid(logits)
	hit := graph.Mul(graph.Square(graph.OneMinus(p)), softplus(graph.Neg(logits)))
	miss := graph.Mul(graph.Square(p), softplus(logits))
	focal := graph.Add(graph.MulScalar(graph.Mul(is, hit), alpha), graph.MulScalar(graph.Mul(not, miss), 1-alpha))
	focalMean := graph.Div(graph.ReduceAllSum(focal), count)

	giou := GIoUSides(distances(raw), graph.ConvertDType(side, out.DType()))
	box := graph.Div(graph.ReduceAllSum(graph.Mul(positive, graph.OneMinus(giou))), count)
	learn.Report(env, "focal", focalMean)
	learn.Report(env, "giou", box)
	return graph.Add(focalMean, box)
}

func softplus(x *graph.Node) *graph.Node {
	return graph.Add(graph.MaxScalar(x, 0), graph.Log1P(graph.Exp(graph.Neg(graph.Abs(x)))))
}

// distances turns the head's raw values into pixels; the exponent is kept below 6, beyond any picture here.
func distances(raw *graph.Node) *graph.Node {
	return graph.MulScalar(graph.Exp(graph.MinScalar(raw, maxLog)), stride)
}

const maxLog = 6

// GIoUSides is the generalised IoU (arXiv:1902.09630) of boxes given by the distances from a common point to their
// sides: [..., 4] in the order left, top, right, bottom, all at least 0. The result, [...], lies in (-1, 1].
func GIoUSides(a, b *graph.Node) *graph.Node {
	side := func(x *graph.Node, i int) *graph.Node {
		at := make([]graph.SliceAxisSpec, x.Rank())
		for k := range at {
			at[k] = graph.AxisRange()
		}
		at[x.Rank()-1] = graph.AxisElem(i)
		return graph.Squeeze(graph.Slice(x, at...), -1)
	}
	area := func(x *graph.Node) *graph.Node {
		return graph.Mul(graph.Add(side(x, 0), side(x, 2)), graph.Add(side(x, 1), side(x, 3)))
	}
	inter, hull := area(graph.Min(a, b)), area(graph.Max(a, b))
	union := graph.Sub(graph.Add(area(a), area(b)), inter)
	const tiny = 1e-9
	iou := graph.Div(inter, graph.AddScalar(union, tiny))
	return graph.Sub(iou, graph.Div(graph.Sub(hull, union), graph.AddScalar(hull, tiny)))
}

// DetectOptions bound what Detect returns.
type DetectOptions struct {
	Top       int     // cells kept per picture, by their best class; 0: 300
	Threshold float64 // that a class score must exceed; 0: 0.05, Zero for 0
	Batch     int     // pictures at a time; 0: 16
}

// Detect finds raw boxes, before any suppression, in pictures like those of Train: for each picture the cells with the
// best class scores, and of these every class above the threshold. Boxes are cut at the picture's borders. Image is
// the place of the picture, Index the cell; detections come in the order of pictures, then cells, then classes.
func (d *Detector) Detect(ctx context.Context, b compute.Backend, scenes []Scene, o DetectOptions) ([]Detection, error) {
	o.Top, o.Batch = cmp.Or(o.Top, 300), cmp.Or(o.Batch, 16)
	switch o.Threshold {
	case 0:
		o.Threshold = 0.05
	case Zero:
		o.Threshold = 0
	}
	if o.Top < 1 || o.Batch < 1 || !(o.Threshold >= 0) {
		return nil, fmt.Errorf("detect: top %d cells in batches of %d with scores above %g; want at least 1, 1 and 0", o.Top, o.Batch, o.Threshold)
	}
	for i, s := range scenes {
		if err := d.check(Scene{Pixels: s.Pixels}); err != nil {
			return nil, fmt.Errorf("detect: scene %d: %w", i, err)
		}
	}
	run, err := nn.NewRunner(b, d.Net, nn.RunOptions{})
	if err != nil {
		return nil, err
	}
	defer run.Finalize()
	var dets []Detection
	for from := 0; from < len(scenes); from += o.Batch {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n := min(o.Batch, len(scenes)-from)
		pixels := make([]float32, 0, n*d.Height*d.Width*d.Channels)
		for _, s := range scenes[from : from+n] {
			pixels = append(pixels, s.Pixels...)
		}
		out, err := run.Run(tensors.FromFlatDataAndDimensions(pixels, n, d.Height, d.Width, d.Channels))
		if err != nil {
			return nil, fmt.Errorf("detect: %w", err)
		}
		if out[0].DType() != dtypes.Float32 {
			return nil, fmt.Errorf("detect: the network gives %s, want float32", out[0].DType())
		}
		values := nn.Floats(out[0])
		per := len(values) / n
		for k := range n {
			dets = append(dets, d.decode(values[k*per:(k+1)*per], from+k, o)...)
		}
	}
	return dets, nil
}

// decode reads one picture's output.
func (d *Detector) decode(out []float32, image int, o DetectOptions) (dets []Detection) {
	width := d.Classes + 4
	type best struct {
		cell  int
		logit float32
	}
	cells := make([]best, 0, len(out)/width)
	limit := float32(math.Inf(-1))
	if o.Threshold > 0 {
		limit = float32(math.Log(o.Threshold / (1 - o.Threshold)))
	}
	for i := range len(out) / width {
		if m := slices.Max(out[i*width : i*width+d.Classes]); m > limit {
			cells = append(cells, best{i, m})
		}
	}
	slices.SortStableFunc(cells, func(a, b best) int { return cmp.Compare(b.logit, a.logit) })
	cells = cells[:min(len(cells), o.Top)]
	slices.SortFunc(cells, func(a, b best) int { return cmp.Compare(a.cell, b.cell) })
	for _, c := range cells {
		v := out[c.cell*width : (c.cell+1)*width]
		x, y := centre(c.cell, d.Width/stride)
		var side [4]float64
		for k := range side {
			side[k] = stride * math.Exp(min(float64(v[d.Classes+k]), maxLog))
		}
		box := RectOf([4]float64{
			max(x-side[0], 0), max(y-side[1], 0), min(x+side[2], float64(d.Width)), min(y+side[3], float64(d.Height)),
		})
		for class, logit := range v[:d.Classes] {
			if score := 1 / (1 + math.Exp(-float64(logit))); score > o.Threshold {
				dets = append(dets, Detection{Image: image, Class: class, Box: box, Score: score, Index: c.cell})
			}
		}
	}
	return dets
}
