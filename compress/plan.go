package compress

import (
	"fmt"
	"slices"

	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
)

// Forecast is what a compression will need and give, before any of it is done. Sizes are those of codes of the planned bits
// with a scale and a zero point for each output channel; a method that stores its weights otherwise differs by its tables.
type Forecast struct {
	Sites       []SiteForecast `json:"sites"`
	FloatBytes  int64          `json:"float_bytes"` // all parameters, as they are
	Bytes       int64          `json:"bytes"`       // all parameters, afterwards
	MACs        int64          `json:"multiply_adds"`
	BitOps      float64        `json:"bit_operations"` // Σ multiply-adds × weight bits × activation bits
	Memory      MemoryForecast `json:"memory"`
	Latency     float64        `json:"latency_share"` // of the float network, by LatencyModel
	Quantisable int            `json:"quantised_sites"`
}

// SiteForecast is a site's part of a Forecast.
type SiteForecast struct {
	Name       string `json:"name"`
	Kind       string `json:"kind"`
	Shape      []int  `json:"shape"`
	WeightBits int    `json:"weight_bits"`
	ActBits    int    `json:"activation_bits"`
	FloatBytes int64  `json:"float_bytes"`
	Bytes      int64  `json:"bytes"`
	MACs       int64  `json:"multiply_adds"` // for one case
}

// MemoryForecast estimates what a run needs, in bytes. Live is what is alive at once in its heaviest phase; Total and Least
// add the program and what waits for the garbage collector.
type MemoryForecast struct {
	Parameters  int64 `json:"parameters"`  // of the networks and of what backends keep of their weights
	Activations int64 `json:"activations"` // the most that passes, the method or the outputs that are compared hold at once
	Examples    int64 `json:"examples"`
	Program     int64 `json:"program"`
	Live        int64 `json:"live"`  // parameters, activations and examples
	Total       int64 `json:"total"` // Go lets the heap grow to twice what is alive
	Least       int64 `json:"least"` // under a limit it collects garbage more often: a quarter above what is alive is enough
}

// programBytes is the memory of the program itself.
const programBytes = 120_000_000

// LatencyModel says what Forecast.Latency and the search for a latency mean.
const LatencyModel = "a site takes time in proportion to its multiply-adds × the wider of weight and activation bits / 32, so that 8-bit integers are four times as fast as float32; no processor is measured"

// ForecastBits forecasts the network with the given bits of each site, 32 for float; sites that are not named stay as they
// are. The memory is left to Memory.
func ForecastBits(net *nn.Network, bits map[string]Bits) (*Forecast, error) {
	sh, err := net.Shapes(1)
	if err != nil {
		return nil, err
	}
	cost, err := net.Cost(1)
	if err != nil {
		return nil, err
	}
	f := &Forecast{FloatBytes: Size(net), Bytes: Size(net), MACs: cost.MACs}
	counted := map[string]bool{}
	time, whole := 0., 0.
	for _, n := range net.Sites() {
		lin := n.Op.(nn.Linear)
		in := make([]shapes.Shape, len(n.In))
		for i, v := range n.In {
			in[i] = sh[v]
		}
		w := lin.WeightShape(in)
		s := SiteForecast{
			Name: n.Name, Kind: n.Op.Kind(), Shape: slices.Clone(w.Dimensions), WeightBits: 32, ActBits: 32,
			FloatBytes: 4 * int64(w.Size()), MACs: cost.ByNode[n.Name],
		}
		s.Bytes = WeightBytes(net, n)
		if b, ok := bits[n.Name]; ok {
			s.WeightBits, s.ActBits = b.Weight, b.Act
			if b.Weight < 32 {
				f.Quantisable++
				now := UniformBytes(w.Size(), w.Dimensions[0], b.Weight)
				if p := n.P["w"]; p == "" || !counted[p] {
					counted[p] = true
					f.Bytes += now - s.Bytes
				}
				s.Bytes = now
			}
		}
		f.BitOps += float64(s.MACs) * float64(s.WeightBits) * float64(s.ActBits)
		time += float64(s.MACs) * float64(max(s.WeightBits, s.ActBits)) / 32
		whole += float64(s.MACs)
		f.Sites = append(f.Sites, s)
	}
	// Products of activations and what else costs multiply-adds keep their time.
	rest := float64(cost.MACs) - whole
	f.BitOps += rest * 32 * 32
	if f.Latency = 1; cost.MACs > 0 {
		f.Latency = (time + rest) / float64(cost.MACs)
	}
	return f, nil
}

// UniformBytes is the stored size of a weight of so many values in rows, on a uniform grid of a scale and a zero point a
// row.
func UniformBytes(values, rows, bits int) int64 {
	if bits >= 32 {
		return 4 * int64(values)
	}
	return (int64(values)*int64(bits)+7)/8 + 4*int64(rows) + (int64(rows)*int64(bits)+7)/8
}

// PeakActivations is the most bytes of values that are alive at once when the network runs node by node on so many cases.
// A backend that fuses nodes needs less.
func PeakActivations(net *nn.Network, cases int) (int64, error) {
	l, err := liveValues(net, cases)
	return l.peak, err
}

// WalkBytes is the most that Walk holds of a network on so many cases: the values that are alive; what the native backend
// takes to run a convolution beside them, its output before the bias is added and its input with zeros around it; and a copy
// of the largest value, as statistics on the host take it. WalkPairs walks two networks, and has each value once more.
func WalkBytes(net *nn.Network, cases int) (int64, error) {
	l, err := liveValues(net, cases)
	return l.peakRun + l.largest, err
}

// WalkPairsBytes is WalkBytes of WalkPairs and WalkBeside.
func WalkPairsBytes(net *nn.Network, cases int) (int64, error) {
	l, err := liveValues(net, cases)
	return l.peak + l.peakRun + l.largest, err
}

// TrainBytes is what a training step on so many cases holds: all values, kept for the gradient, and as much for the way back as
// a pass has alive.
func TrainBytes(net *nn.Network, cases int) (int64, error) {
	l, err := liveValues(net, cases)
	return l.all + l.peakRun, err
}

// live is what liveValues finds, in bytes.
type live struct {
	all     int64 // values
	peak    int64 // values alive at once
	peakRun int64 // the same with what a node takes while it runs
	largest int64 // value
}

func liveValues(net *nn.Network, cases int) (l live, err error) {
	if cases < 1 {
		return l, fmt.Errorf("compress: %d cases", cases)
	}
	sh, err := net.Shapes(cases)
	if err != nil {
		return l, err
	}
	last := map[string]int{}
	for i, n := range net.Nodes {
		for _, v := range n.In {
			last[v] = i
		}
	}
	for _, v := range net.Outputs {
		last[v] = len(net.Nodes)
	}
	var alive int64
	size := func(v string) int64 { return int64(sh[v].ByteSize()) }
	for _, in := range net.Inputs {
		alive += size(in.Name)
	}
	dead := map[string]bool{}
	for i, n := range net.Nodes {
		for _, v := range n.Out {
			alive += size(v)
			l.all += size(v)
			l.largest = max(l.largest, size(v))
		}
		var room int64
		if c, ok := n.Op.(nn.Conv); ok {
			room = size(n.Out[0]) + PaddedBytes(c, sh[n.In[0]])
		}
		l.peak, l.peakRun = max(l.peak, alive), max(l.peakRun, alive+room)
		for _, v := range slices.Concat(n.In, n.Out) {
			if v != "" && last[v] <= i && !dead[v] {
				dead[v] = true
				alive -= size(v)
			}
		}
	}
	return l, nil
}

// PaddedBytes is the size of a convolution's input [cases, spatial..., channels] with its zeros around it, which the native
// backend makes; 0 where it has none.
func PaddedBytes(c nn.Conv, in shapes.Shape) int64 {
	n, padded := int64(in.ByteSize()), false
	for i, p := range c.Pad {
		if d := int64(in.Dimensions[1+i]); p != [2]int{} && d > 0 {
			n, padded = n/d*(d+int64(p[0]+p[1])), true
		}
	}
	if !padded {
		return 0
	}
	return n
}

// Holder is a Method that says what it holds at most beside the networks' parameters and the examples, in bytes.
type Holder interface {
	Holds(net *nn.Network, cases int) (int64, error)
}

// Load is what a run brings together, for Memory.
type Load struct {
	Networks int   // copies of the parameters
	Cases    int   // of a pass
	Method   int64 // bytes that the method holds at its peak, beside parameters and examples; 0: passes alone
	Examples int64 // bytes of the examples that are in memory throughout
	Judged   int   // cases of which the outputs of two networks are compared
}

// Memory estimates the peak of a run: the copies of the parameters, the examples, and the most of what its phases hold. They
// are the method's own; the comparison of the sites' outputs, where two networks make a pass at once; and that of the
// outputs of all judged cases after such a pass.
func Memory(net *nn.Network, r Load) (MemoryForecast, error) {
	pass, err := liveValues(net, r.Cases)
	if err != nil {
		return MemoryForecast{}, err
	}
	sh, err := net.Shapes(1)
	if err != nil {
		return MemoryForecast{}, err
	}
	var sites int64
	for _, n := range net.Sites() {
		sites += int64(r.Cases) * max(sh[n.Out[0]].ByteSize(), 0)
	}
	outputs := int64(r.Judged) * max(sh[net.Outputs[0]].ByteSize(), 0)
	m := MemoryForecast{
		Parameters:  int64(r.Networks) * net.Params.Bytes(),
		Activations: max(r.Method, 2*(pass.peakRun+min(sites, siteErrorBytes)), pass.peakRun+2*outputs),
		Examples:    r.Examples, Program: programBytes,
	}
	m.Live = m.Parameters + m.Activations + m.Examples
	m.Total, m.Least = 2*m.Live+programBytes, m.Live+m.Live/4+programBytes
	return m, nil
}
