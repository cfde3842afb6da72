package quant

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"sort"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/internal/half"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// Table stores a site's weight as indices into tables of levels: W[o,i] = scale[o]·table[group(o)][q[o,i]]. Power laws,
// codebooks, shifts and low-bit floating-point formats are all of this form. Parameters: "q", the indices (uint8, of the
// weight's shape); "table" [Groups, levels] float32; "group" [rows] uint8 if Groups > 1; "scale" [rows] float32 if Scaled.
type Table struct {
	Bits   int  // of an index, 1 to 8; a table has at most 2^Bits levels
	Levels int  // of a table; 0: 2^Bits
	Groups int  // tables, of which each output channel uses one; 0: 1
	Scaled bool // a factor per output channel
	Half   bool // levels are half-precision numbers and take two bytes each
}

var (
	_ nn.Repr             = Table{}
	_ compress.Stored     = Table{}
	_ onnx.WeightExporter = Table{}
)

// Kind returns "table".
func (Table) Kind() string { return "table" }

// WeightBits are the bits of an index.
func (t Table) WeightBits() int { return t.Bits }

func (t Table) levels() int {
	if t.Levels > 0 {
		return t.Levels
	}
	return 1 << t.Bits
}

// Specs are the indices, the tables, the groups and the scales.
func (t Table) Specs(w shapes.Shape) []nn.Spec {
	if t.Bits < 1 || t.Bits > 8 || t.Levels < 0 || t.levels() > 1<<t.Bits || t.Groups < 0 || t.Groups > 256 {
		panic(fmt.Errorf("tables of %d levels for %d bits in %d groups; want 1 to 8 bits, at most 2^bits levels and 256 groups", t.levels(), t.Bits, t.Groups))
	}
	specs := []nn.Spec{
		{Name: "q", Shape: w, Role: nn.Constant},
		{Name: "table", Shape: shapes.Make(dtypes.Float32, max(t.Groups, 1), t.levels()), Role: nn.Constant},
	}
	if t.Groups > 1 {
		specs = append(specs, nn.Spec{Name: "group", Shape: shapes.Make(dtypes.Float32, w.Dimensions[0]), Role: nn.Constant})
	}
	if t.Scaled {
		specs = append(specs, nn.Spec{Name: "scale", Shape: shapes.Make(dtypes.Float32, w.Dimensions[0]), Role: nn.Constant, Init: nn.Fill(1)})
	}
	return specs
}

// Value looks the levels up.
func (t Table) Value(c *nn.Ctx) *graph.Node {
	q, table := c.P("q"), c.P("table")
	dims := q.Shape().Dimensions
	rows := max(dims[0], 1)
	index := graph.Reshape(graph.ConvertDType(q, dtypes.Int32), rows, q.Shape().Size()/rows)
	if t.Groups > 1 {
		group := graph.ConvertDType(c.P("group"), dtypes.Int32)
		index = graph.Add(index, graph.Reshape(graph.MulScalar(group, t.levels()), rows, 1))
	}
	w := graph.Gather(graph.Reshape(table, table.Shape().Size()), graph.InsertAxes(index, -1))
	if t.Scaled {
		w = graph.Mul(w, graph.Reshape(c.P("scale"), rows, 1))
	}
	return graph.Reshape(w, dims...)
}

// StoredBytes counts Bits per weight, four bytes per level (Half: two) and scale, and for the groups either the smallest
// number of whole bits per output channel or, where a group's channels are contiguous and that is less, four bytes for
// each boundary.
func (t Table) StoredBytes(param func(local string) *nn.Param) int64 {
	size := func(local string) int64 {
		if p := param(local); p != nil {
			return int64(p.Value.Shape().Size())
		}
		return 0
	}
	level := int64(4)
	if t.Half {
		level = 2
	}
	n := (size("q")*int64(t.Bits)+7)/8 + level*size("table") + 4*size("scale")
	if p := param("group"); p != nil {
		group := p.Data()
		each := (int64(len(group))*int64(bits.Len(uint(t.Groups-1))) + 7) / 8
		if slices.IsSorted(group) {
			each = min(each, 4*int64(t.Groups-1))
		}
		n += each
	}
	return n
}

// TableWeights are a weight's indices and tables on the host, row-major, output channel first.
type TableWeights struct {
	Bits   int
	Shape  []int       // of the weight
	Codes  []uint8     // indices
	Tables [][]float32 // one or more, all of one length
	Group  []uint8     // table of each output channel; nil: the first
	Scale  []float32   // factor of each output channel; nil: 1
	Half   bool        // Store rounds the levels to half precision
}

// Check reports what does not fit.
func (w *TableWeights) Check() error {
	size := 1
	for _, d := range w.Shape {
		size *= d
	}
	if len(w.Shape) == 0 || len(w.Codes) != size || len(w.Tables) == 0 || len(w.Tables) > 256 || len(w.Tables[0]) == 0 || len(w.Tables[0]) > 1<<w.Bits || w.Bits < 1 || w.Bits > 8 {
		return fmt.Errorf("quant: %d indices of %d bits and %d tables for a weight of %v", len(w.Codes), w.Bits, len(w.Tables), w.Shape)
	}
	rows := w.Shape[0]
	if w.Group != nil && len(w.Group) != rows || w.Scale != nil && len(w.Scale) != rows || w.Group == nil && len(w.Tables) > 1 {
		return fmt.Errorf("quant: %d groups and %d scales for %d output channels", len(w.Group), len(w.Scale), rows)
	}
	for _, t := range w.Tables {
		if len(t) != len(w.Tables[0]) {
			return fmt.Errorf("quant: tables of %d and %d levels", len(w.Tables[0]), len(t))
		}
		if err := checkFinite(t); err != nil {
			return err
		}
	}
	for _, g := range w.Group {
		if int(g) >= len(w.Tables) {
			return fmt.Errorf("quant: table %d of %d", g, len(w.Tables))
		}
	}
	for _, c := range w.Codes {
		if int(c) >= len(w.Tables[0]) {
			return fmt.Errorf("quant: index %d into a table of %d levels", c, len(w.Tables[0]))
		}
	}
	return checkFinite(w.Scale)
}

// Decode returns the weight.
func (w *TableWeights) Decode() []float32 {
	out := make([]float32, len(w.Codes))
	per := len(w.Codes) / max(w.Shape[0], 1)
	for i, c := range w.Codes {
		o, t := i/per, 0
		if w.Group != nil {
			t = int(w.Group[o])
		}
		out[i] = w.Tables[t][c]
		if w.Scale != nil {
			out[i] *= w.Scale[o]
		}
	}
	return out
}

// Store returns the form and the parameters in which the weight is stored.
func (w *TableWeights) Store() (Table, map[string]*tensors.Tensor, error) {
	if err := w.Check(); err != nil {
		return Table{}, nil, err
	}
	levels := len(w.Tables[0])
	r := Table{Bits: w.Bits, Levels: levels, Groups: len(w.Tables), Scaled: w.Scale != nil, Half: w.Half}
	table := slices.Concat(w.Tables...)
	if w.Half {
		for i, v := range table {
			if table[i] = half.FromF16(half.ToF16(v)); math.IsInf(float64(table[i]), 0) {
				return Table{}, nil, fmt.Errorf("quant: level %g does not fit half precision", v)
			}
		}
	}
	p := map[string]*tensors.Tensor{
		"q":     tensors.FromFlatDataAndDimensions(slices.Clone(w.Codes), w.Shape...),
		"table": tensors.FromFlatDataAndDimensions(table, len(w.Tables), levels),
	}
	if len(w.Tables) > 1 {
		p["group"] = tensors.FromFlatDataAndDimensions(slices.Clone(w.Group), len(w.Group))
	}
	if w.Scale != nil {
		p["scale"] = tensors.FromFlatDataAndDimensions(slices.Clone(w.Scale), len(w.Scale))
	}
	return r, p, nil
}

// NearestLevel returns the index of the level closest to each value; levels ascend strictly, and of two equally close
// ones the lower index wins.
func NearestLevel(levels, x []float32) []uint8 {
	out := make([]uint8, len(x))
	for i, v := range x {
		j := sort.Search(len(levels), func(k int) bool { return levels[k] >= v })
		switch {
		case j == len(levels):
			j--
		case j > 0 && float64(v)-float64(levels[j-1]) <= float64(levels[j])-float64(v):
			j--
		}
		out[i] = uint8(j)
	}
	return out
}

// ExportWeight writes indices, tables, and the standard operators that look up: Gather of the flattened tables, and a
// product with the scales.
func (t Table) ExportWeight(e *onnx.Emitter, n *nn.Node, perm []int) (string, error) {
	net := e.Network()
	q, table := net.Param(n, "q"), net.Param(n, "table")
	if q == nil || table == nil {
		return "", fmt.Errorf("its indices or tables are missing")
	}
	shape := q.Value.Shape().Dimensions
	rows := max(shape[0], 1)
	per := q.Value.Shape().Size() / rows
	codes := make([]int32, q.Value.Shape().Size())
	for i, v := range q.Data() {
		codes[i] = int32(v)
	}
	kind := onnx.Uint8
	if t.Bits <= 4 && e.Opset() >= 21 {
		kind = onnx.Uint4
	}
	base := q.Name
	index := e.Node("Cast", n.Name+"/index", []string{e.Codes(base, kind, codes, rows, per)}, onnx.Int("to", int(onnx.Int32)))
	if t.Groups > 1 {
		group := net.Param(n, "group")
		if group == nil {
			return "", fmt.Errorf("its groups are missing")
		}
		first := make([]int32, rows)
		for i, g := range group.Data() {
			first[i] = int32(g) * int32(t.levels())
		}
		index = e.Node("Add", n.Name+"/place", []string{index, e.Codes(base+"/group", onnx.Int32, first, rows, 1)})
	}
	levels := table.Data()
	var tables string
	if t.Half {
		raw := make([]byte, 0, 2*len(levels))
		for _, v := range levels {
			raw = binary.LittleEndian.AppendUint16(raw, half.ToF16(v))
		}
		tables = e.Node("Cast", n.Name+"/tables", []string{e.Initializer(base+"/table", onnx.Float16, []int{len(levels)}, raw)}, onnx.Int("to", int(onnx.Float32)))
	} else {
		tables = e.Floats(base+"/table", levels, len(levels))
	}
	w := e.Node("Gather", n.Name+"/levels", []string{tables, index})
	if t.Scaled {
		scale := net.Param(n, "scale")
		if scale == nil {
			return "", fmt.Errorf("its scales are missing")
		}
		w = e.Node("Mul", n.Name+"/scaled", []string{w, e.Floats(base+"/scale", scale.Data(), rows, 1)})
	}
	if len(shape) != 2 {
		w = e.Node("Reshape", n.Name+"/rows", []string{w, e.List(shape...)})
	}
	if len(perm) > 0 {
		w = e.Node("Transpose", n.Name+"/weight", []string{w}, onnx.Ints("perm", perm...))
	}
	return w, nil
}
