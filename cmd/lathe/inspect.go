package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/gomlx/compute/shapes"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/gguf"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

// inspection is what lathe inspect prints.
type inspection struct {
	File      string            `json:"file"`
	Format    string            `json:"format"` // onnx, safetensors, gguf
	Bytes     int64             `json:"bytes"`  // of the file
	Made      string            `json:"made,omitempty"`
	Inputs    []string          `json:"inputs,omitempty"`
	Outputs   []string          `json:"outputs,omitempty"`
	Meta      map[string]string `json:"metadata,omitempty"`
	Operators map[string]int    `json:"operators,omitempty"`
	Quantised []string          `json:"quantised,omitempty"` // formats of few bits that occur, in words
	Types     []inspectedType   `json:"types"`
	Tensors   []inspectedTensor `json:"tensors"`
	Sites     []inspectedSite   `json:"sites,omitempty"`
	MACs      int64             `json:"multiply_adds,omitempty"` // of one case; of one token in GGUF
	Problem   string            `json:"problem,omitempty"`       // why it cannot be run here; empty: it can
	Notes     []string          `json:"notes,omitempty"`

	weights map[string]string // ONNX: stored tensor of a node's weight
}

type inspectedType struct {
	Type    string `json:"type"`
	Tensors int    `json:"tensors"`
	Values  int64  `json:"values"`
	Bytes   int64  `json:"bytes"`
}

type inspectedTensor struct {
	Name     string  `json:"name"`
	Type     string  `json:"type"`
	Shape    []int64 `json:"shape"`
	Bytes    int64   `json:"bytes"`
	External string  `json:"external,omitempty"`
}

// inspectedSite is a layer with a weight.
type inspectedSite struct {
	Name       string  `json:"name"`
	Kind       string  `json:"kind"`
	Shape      []int   `json:"shape"`
	Stored     string  `json:"stored"`     // plain, uniform, table, ... or the tensor's type
	Bits       float64 `json:"bits"`       // stored per value, scales included
	Parameters int64   `json:"parameters"` // of the weight
	Bytes      int64   `json:"bytes"`
	ByteShare  float64 `json:"byte_share"` // of all parameters
	MACs       int64   `json:"multiply_adds"`
	MACShare   float64 `json:"multiply_add_share"`
}

func newInspectCommand(a *app) *cobra.Command {
	var shapeFlags []string
	var tokens int
	var all bool
	cmd := &cobra.Command{
		Use:   "inspect FILE",
		Short: "What a model file holds: tensors, types, bytes, and what each layer costs",
		Long: `List what an ONNX, safetensors or GGUF file holds - tensors, shapes, types, bytes, formats of few bits - and, when it is a
network that lathe reads, its sites (the layers with weights) with parameters, multiply-adds of one case, bytes and their
shares. A folder of a published BERT encoder or EfficientNet-Lite0 may be given, too. What cannot be run is listed all the
same, with the reason.`,
		Example: `  lathe inspect model.onnx
  lathe inspect rec.onnx --shape x=1,3,48,320
  lathe inspect SmolLM2-135M-Instruct.Q4_1.gguf --all
  lathe inspect vit4.onnx --json`,
		Args: exactArgs("a file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			dims, err := parseShapes(shapeFlags)
			if err != nil {
				return err
			}
			r, err := inspect(args[0], dims, tokens)
			if err != nil {
				return err
			}
			return a.emit(r, func(w io.Writer) error { return r.write(w, a.width(), all) })
		},
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&shapeFlags, "shape", nil, "shape of an input that the model leaves open, name=1,3,48,320; may be repeated")
	fl.IntVar(&tokens, "tokens", 0, "length of a BERT encoder's inputs (default: 128)")
	fl.BoolVar(&all, "all", false, "list all tensors, not the 12 largest")
	return cmd
}

func inspect(path string, dims map[string][]int, tokens int) (*inspection, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	file := path
	if info.IsDir() {
		file = filepath.Join(path, "model.safetensors")
		if info, err = os.Stat(file); err != nil {
			return nil, fmt.Errorf("%s: the folder holds no model.safetensors; name the model's file", path)
		}
	}
	r := &inspection{File: path, Bytes: info.Size()}
	switch strings.ToLower(filepath.Ext(file)) {
	case ".onnx":
		err = r.readONNX(file)
	case ".safetensors":
		err = r.readSafetensors(file)
	case ".gguf":
		err = r.readGGUF(file)
	default:
		return nil, usageErrorf("%s: lathe inspects .onnx, .safetensors and .gguf files", path)
	}
	if err != nil {
		return nil, err
	}
	if r.Format != "gguf" {
		net, err := readAnyNetwork(path, dims, tokens)
		var usage *usageError
		switch {
		case errors.As(err, &usage):
			return nil, err
		case err != nil:
			r.Problem = err.Error()
		default:
			if err := r.addNetwork(net); err != nil {
				r.Problem = err.Error()
			}
		}
	}
	r.count()
	return r, nil
}

// quantisers are ONNX operators that mean numbers of few bits.
var quantisers = []string{
	"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
	"com.microsoft.MatMulNBits", "com.microsoft.QAttention", "com.microsoft.QGemm", "com.microsoft.DynamicQuantizeMatMul",
}

func (r *inspection) readONNX(path string) error {
	s, err := onnx.SummarizeFile(path)
	if err != nil {
		return err
	}
	r.Format, r.Made, r.Meta, r.Operators = "onnx", s.Producer, s.Meta, s.Operators
	for _, domain := range slices.Sorted(maps.Keys(s.Opsets)) {
		r.Made += fmt.Sprintf(", operator set %d%s", s.Opsets[domain], strings.TrimRight(" of "+domain, " of"))
	}
	r.Made = strings.TrimPrefix(r.Made, ", ")
	value := func(v onnx.SummaryValue) string {
		return fmt.Sprintf("%s %s[%s]", v.Name, strings.ToLower(v.Type), strings.Join(v.Shape, ", "))
	}
	for _, v := range s.Inputs {
		r.Inputs = append(r.Inputs, value(v))
	}
	for _, v := range s.Outputs {
		r.Outputs = append(r.Outputs, value(v))
	}
	r.weights = s.Weights
	for _, t := range s.Tensors {
		r.Tensors = append(r.Tensors, inspectedTensor(t))
	}
	for _, op := range quantisers {
		if n := s.Operators[op]; n > 0 {
			r.Quantised = append(r.Quantised, fmt.Sprintf("%d %s", n, op))
		}
	}
	return nil
}

func (r *inspection) readSafetensors(path string) error {
	f, err := safetensors.ReadFile(path)
	if err != nil {
		return err
	}
	r.Format, r.Meta = "safetensors", map[string]string{}
	for k, v := range f.Meta {
		if len(v) <= 4096 { // not the graph
			r.Meta[k] = v
		}
	}
	for _, t := range f.Tensors {
		x := inspectedTensor{Name: t.Name, Type: string(t.DType), Bytes: int64(len(t.Data)), Shape: []int64{}}
		for _, d := range t.Shape {
			x.Shape = append(x.Shape, int64(d))
		}
		r.Tensors = append(r.Tensors, x)
	}
	return nil
}

func (r *inspection) readGGUF(path string) error {
	f, err := gguf.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r.Format, r.Made, r.Meta = "gguf", fmt.Sprintf("version %d", f.Version), map[string]string{}
	for _, k := range f.Keys {
		if v, ok := f.Meta[k].(string); ok && len(v) <= 200 {
			r.Meta[k] = v
		}
	}
	if arch := r.Meta["general.architecture"]; arch != "" {
		r.Made += ", architecture " + arch
	}
	blocks := map[string]bool{}
	for _, t := range f.Tensors {
		x := inspectedTensor{Name: t.Name, Type: t.Type.String(), Bytes: t.Bytes, Shape: []int64{}}
		for _, d := range t.Shape {
			x.Shape = append(x.Shape, int64(d))
		}
		r.Tensors = append(r.Tensors, x)
		if strings.HasPrefix(x.Type, "Q") {
			blocks[fmt.Sprintf("%s (%.4g bits a value)", x.Type, t.Type.BitsPerValue())] = true
		}
		if len(t.Shape) != 2 {
			continue
		}
		s := inspectedSite{Name: strings.TrimSuffix(t.Name, ".weight"), Kind: "dense", Shape: t.Shape, Stored: x.Type, Parameters: int64(t.Elements()), Bytes: t.Bytes, MACs: int64(t.Elements())}
		if strings.HasPrefix(t.Name, "token_embd") {
			s.Kind = "embedding"
			if f.Tensor("output.weight") != nil {
				s.MACs = 0 // a table that is only read
			} else {
				s.Kind = "embedding and head"
			}
		}
		r.MACs += s.MACs
		r.Sites = append(r.Sites, s)
	}
	r.Quantised = slices.Sorted(maps.Keys(blocks))
	r.Notes = append(r.Notes, "multiply-adds are of one token, attention over earlier tokens not counted")
	return nil
}

// addNetwork adds the sites of a network that was read.
func (r *inspection) addNetwork(net *nn.Network) error {
	sh, err := net.Shapes(1)
	if err != nil {
		return err
	}
	cost, err := net.Cost(1)
	if err != nil {
		return err
	}
	r.MACs = cost.MACs
	if len(r.Inputs) == 0 {
		for _, in := range net.Inputs {
			r.Inputs = append(r.Inputs, fmt.Sprintf("%s %s", in.Name, in.Shape))
		}
		for _, out := range net.Outputs {
			r.Outputs = append(r.Outputs, fmt.Sprintf("%s %s", out, sh[out]))
		}
	}
	kinds := map[string]int{}
	for _, n := range net.Nodes {
		if k := n.Op.Kind(); strings.Contains(k, "quantize") {
			kinds[k]++
		}
		lin, ok := n.Op.(nn.Linear)
		if !ok {
			continue
		}
		in := make([]shapes.Shape, len(n.In))
		for i, v := range n.In {
			in[i] = sh[v]
		}
		w := lin.WeightShape(in)
		s := inspectedSite{
			Name: n.Name, Kind: n.Op.Kind(), Shape: slices.Clone(w.Dimensions), Stored: lin.Repr().Kind(), Parameters: int64(w.Size()),
			Bytes: compress.WeightBytes(net, n), MACs: cost.ByNode[n.Name],
		}
		if t := r.stored(n.Name, n.Out[0], s.Parameters); t != nil {
			s.Stored, s.Bytes = t.Type, t.Bytes
		}
		if b, ok := lin.Repr().(interface{ WeightBits() int }); ok {
			s.Stored = fmt.Sprintf("%s, %d bits", s.Stored, b.WeightBits())
			kinds[s.Stored]++
		}
		r.Sites = append(r.Sites, s)
	}
	if r.Format == "safetensors" {
		for _, k := range slices.Sorted(maps.Keys(kinds)) {
			r.Quantised = append(r.Quantised, fmt.Sprintf("%d %s", kinds[k], k))
		}
	}
	return nil
}

// stored is the tensor in which an ONNX file keeps a site's weight, which a reader decodes; nil: it is not known.
func (r *inspection) stored(node, value string, values int64) *inspectedTensor {
	name := cmp.Or(r.weights[node], r.weights[value], r.weights[node+"/product"])
	for i, t := range r.Tensors {
		n := int64(1)
		for _, d := range t.Shape {
			n *= d
		}
		if t.Name == name && n == values {
			return &r.Tensors[i]
		}
	}
	return nil
}

// count adds up types and shares.
func (r *inspection) count() {
	byType := map[string]*inspectedType{}
	var bytes int64
	for _, t := range r.Tensors {
		x := byType[t.Type]
		if x == nil {
			x = &inspectedType{Type: t.Type}
			byType[t.Type] = x
		}
		n := 1.
		for _, d := range t.Shape {
			n *= float64(d)
		}
		x.Tensors++
		x.Values += int64(min(n, math.MaxInt32*1e3))
		x.Bytes += t.Bytes
		bytes += t.Bytes
		if t.External != "" {
			r.Notes = append(r.Notes, fmt.Sprintf("the data of %q lie in a file of their own, %q", t.Name, t.External))
		}
	}
	for _, k := range slices.Sorted(maps.Keys(byType)) {
		r.Types = append(r.Types, *byType[k])
	}
	slices.SortStableFunc(r.Types, func(a, b inspectedType) int { return cmp.Compare(b.Bytes, a.Bytes) })
	for i := range r.Sites {
		s := &r.Sites[i]
		s.ByteShare = float64(s.Bytes) / float64(max(bytes, 1))
		s.MACShare = float64(s.MACs) / float64(max(r.MACs, 1))
		s.Bits = 8 * float64(s.Bytes) / float64(max(s.Parameters, 1))
	}
	if len(r.Notes) > 8 {
		r.Notes = append(r.Notes[:8], fmt.Sprintf("and %d more", len(r.Notes)-8))
	}
}

func (r *inspection) write(w io.Writer, width int, all bool) error {
	fmt.Fprintf(w, "%s: %s, %s", r.File, r.Format, report.Bytes(r.Bytes))
	if r.Made != "" {
		fmt.Fprintf(w, ", %s", r.Made)
	}
	fmt.Fprintln(w)
	list := func(what string, v []string) {
		if len(v) > 0 {
			fmt.Fprintf(w, "%-10s %s\n", what, strings.Join(v, "; "))
		}
	}
	list("inputs", r.Inputs)
	list("outputs", r.Outputs)
	list("quantised", r.Quantised)
	var ops []string
	for _, op := range slices.SortedFunc(maps.Keys(r.Operators), func(a, b string) int {
		return cmp.Or(cmp.Compare(r.Operators[b], r.Operators[a]), cmp.Compare(a, b))
	}) {
		ops = append(ops, fmt.Sprintf("%s %d", op, r.Operators[op]))
	}
	if len(ops) > 0 {
		fmt.Fprintf(w, "%-10s %s\n", "operators", strings.Join(ops, ", "))
	}
	for _, k := range slices.Sorted(maps.Keys(r.Meta)) {
		v := r.Meta[k]
		if len(v) > 80 {
			v = v[:80] + "..."
		}
		fmt.Fprintf(w, "%-10s %s = %s\n", "metadata", k, strings.ReplaceAll(v, "\n", " "))
	}
	t := report.Table{Title: "Types", Columns: []string{"type", "tensors", "values", "bytes"}}
	for _, x := range r.Types {
		t.Rows = append(t.Rows, []string{x.Type, strconv.Itoa(x.Tensors), strconv.FormatInt(x.Values, 10), report.Bytes(x.Bytes)})
	}
	fmt.Fprintln(w)
	if err := report.WriteTable(w, t, width); err != nil {
		return err
	}
	tensors := slices.Clone(r.Tensors)
	title := "Tensors"
	if !all && len(tensors) > 12 {
		slices.SortStableFunc(tensors, func(a, b inspectedTensor) int { return cmp.Compare(b.Bytes, a.Bytes) })
		title = fmt.Sprintf("The 12 largest of %d tensors (--all lists them)", len(tensors))
		tensors = tensors[:12]
	}
	t = report.Table{Title: title, Columns: []string{"tensor", "type", "shape", "bytes"}}
	for _, x := range tensors {
		t.Rows = append(t.Rows, []string{x.Name, x.Type, strings.ReplaceAll(strings.Trim(fmt.Sprint(x.Shape), "[]"), " ", "×"), report.Bytes(x.Bytes)})
	}
	fmt.Fprintln(w)
	if err := report.WriteTable(w, t, width); err != nil {
		return err
	}
	if len(r.Sites) > 0 {
		t = report.Table{Title: "Sites", Columns: []string{"site", "kind", "weight", "stored", "bits a value", "bytes", "share", "multiply-adds", "share"}}
		for _, s := range r.Sites {
			t.Rows = append(t.Rows, []string{
				s.Name, s.Kind, dimensions(s.Shape), s.Stored, report.Number(s.Bits), report.Bytes(s.Bytes), pct(s.ByteShare), strconv.FormatInt(s.MACs, 10), pct(s.MACShare),
			})
		}
		t.Note = fmt.Sprintf("%d multiply-adds for a case in all; shares of bytes are of all tensors in the file.", r.MACs)
		fmt.Fprintln(w)
		if err := report.WriteTable(w, t, width); err != nil {
			return err
		}
	}
	for _, n := range r.Notes {
		fmt.Fprintln(w, n)
	}
	if r.Problem != "" {
		fmt.Fprintf(w, "\nlathe cannot run it: %s\n", r.Problem)
	}
	return nil
}
