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

// MemoryForecast estimates the peak of a run in bytes.
type MemoryForecast struct {
	Parameters  int64 `json:"parameters"`  // of the networks and of what backends keep of their weights
	Activations int64 `json:"activations"` // the most that is alive at once in a pass, and the sites' outputs that are compared
	Examples    int64 `json:"examples"`
	Program     int64 `json:"program"`
	Total       int64 `json:"total"` // with the garbage that Go leaves between collections
	Least       int64 `json:"least"` // when a limit makes it collect more often
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
	if cases < 1 {
		return 0, fmt.Errorf("compress: %d cases", cases)
	}
	sh, err := net.Shapes(cases)
	if err != nil {
		return 0, err
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
	var alive, peak int64
	size := func(v string) int64 { return int64(sh[v].ByteSize()) }
	for _, in := range net.Inputs {
		alive += size(in.Name)
	}
	dead := map[string]bool{}
	for i, n := range net.Nodes {
		for _, v := range n.Out {
			alive += size(v)
		}
		peak = max(peak, alive)
		for _, v := range slices.Concat(n.In, n.Out) {
			if v != "" && last[v] <= i && !dead[v] {
				dead[v] = true
				alive -= size(v)
			}
		}
	}
	return peak, nil
}

// Memory estimates the peak of a run: networks copies of the parameters, the activations of two passes over cases at once,
// since a network is compared with another, and the examples.
func Memory(net *nn.Network, networks, cases int, examples int64) (MemoryForecast, error) {
	act, err := PeakActivations(net, cases)
	if err != nil {
		return MemoryForecast{}, err
	}
	sh, err := net.Shapes(1)
	if err != nil {
		return MemoryForecast{}, err
	}
	var outputs int64
	for _, n := range net.Sites() {
		outputs += int64(cases) * max(sh[n.Out[0]].ByteSize(), 0)
	}
	m := MemoryForecast{
		Parameters: int64(networks) * net.Params.Bytes(), Activations: 2 * (act + min(outputs, siteErrorBytes)), Examples: examples, Program: programBytes,
	}
	tensors := m.Parameters + m.Activations + m.Examples
	m.Total, m.Least = 2*tensors+programBytes, tensors+tensors/4+programBytes
	return m, nil
}
