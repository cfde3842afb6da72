package main

import (
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/gomlx/gomlx/core/tensors"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// foldReport is what fold prints.
type foldReport struct {
	Folded   []string   `json:"folded"`   // merged into the layers around them
	Explicit []string   `json:"explicit"` // a scale and a shift in their place
	Kept     []foldKept `json:"kept"`

	Nodes      [2]int  `json:"nodes"`      // before and after
	Parameters [2]int  `json:"parameters"` // before and after, constants not counted
	Difference float64 `json:"difference"` // largest of an output on random inputs, relative to the largest output
	Output     string  `json:"output"`
}

type foldKept struct {
	Node   string `json:"node"`
	Reason string `json:"reason"`
}

func newFoldCommand(a *app) *cobra.Command {
	var out string
	var shapes []string
	var opset int
	cmd := &cobra.Command{
		Use:   "fold MODEL -o OUT.onnx|OUT.safetensors",
		Short: "Merge norms with running statistics into the layers around them",
		Long: `Batch norm, Unified Normalization, PowerNorm without group scaling: such norms are a scale and a shift per channel at
inference. They are merged into the convolution or dense layer in front of them, or into all dense layers behind them, also
through a mean or choice of tokens, and cost nothing then. Where a norm's output is the residual stream itself (post-norm
blocks), a scale and a shift stay in its place. Layer norm and its like take statistics of every case and are kept.

The folded network is run beside the original on random inputs, and the largest difference is printed. It is for
inference: do not train it further with dropout between a norm and its readers.`,
		Example: `  lathe fold vit.safetensors -o vit.onnx
  lathe fold resnet.onnx -o resnet-folded.onnx --json`,
		Args: exactArgs("a model"),
		RunE: func(_ *cobra.Command, args []string) error {
			dims, err := parseShapes(shapes)
			if err != nil {
				return err
			}
			net, err := readNetwork(args[0], dims)
			if err != nil {
				return err
			}
			r, err := foldNetwork(a, net)
			if err != nil {
				return err
			}
			if err := writeNetwork(out, net, opset); err != nil {
				return err
			}
			r.Output = out
			return a.emit(r, r.write)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&out, "output", "o", "", "file to write (.onnx or .safetensors)")
	f.StringArrayVar(&shapes, "shape", nil, "shape of an input that the model leaves open, name=1,3,48,320; may be repeated")
	f.IntVar(&opset, "opset", 0, "operator set of an ONNX file, 17 to 21 (default: 17)")
	_ = cmd.MarkFlagRequired("output")
	return cmd
}

// foldNetwork folds net's norms in place and compares it with what it was.
func foldNetwork(a *app, net *nn.Network) (*foldReport, error) {
	backend, err := a.backend()
	if err != nil {
		return nil, err
	}
	before := net.Clone()
	done, err := fold.Norms(net)
	if err != nil {
		return nil, err
	}
	r := &foldReport{
		Folded: append([]string{}, done.Folded...), Explicit: append([]string{}, done.Explicit...), Kept: []foldKept{},
		Nodes: [2]int{len(before.Nodes), len(net.Nodes)}, Parameters: [2]int{before.Params.Count(), net.Params.Count()},
	}
	for _, k := range done.Kept {
		r.Kept = append(r.Kept, foldKept(k))
	}
	var in []*tensors.Tensor
	for _, i := range net.Inputs {
		v := tensors.FromShape(i.Shape)
		if i.Shape.DType.IsFloat() {
			x := make([]float32, i.Shape.Size())
			rng.Normal(rng.New(0, "fold:"+i.Name), x, 1)
			v = tensors.FromFlatDataAndDimensions(x, i.Shape.Dimensions...)
		}
		in = append(in, v)
	}
	want, err := before.Run(backend, in)
	if err != nil {
		return nil, err
	}
	got, err := net.Run(backend, in)
	if err != nil {
		return nil, err
	}
	for i := range want {
		if !want[i].DType().IsFloat() {
			continue
		}
		largest, worst := 0., 0.
		g := nn.Float64s(got[i])
		for j, w := range nn.Float64s(want[i]) {
			largest, worst = max(largest, math.Abs(w)), max(worst, math.Abs(w-g[j]))
		}
		if worst > 0 {
			r.Difference = max(r.Difference, worst/max(largest, math.SmallestNonzeroFloat32))
		}
	}
	return r, nil
}

func (r *foldReport) write(w io.Writer) error {
	list := func(what string, names []string) {
		if len(names) > 0 {
			fmt.Fprintf(w, "%s: %s\n", what, strings.Join(names, ", "))
		}
	}
	list("merged into neighbouring layers", r.Folded)
	list("a scale and a shift in their place", r.Explicit)
	for _, k := range r.Kept {
		fmt.Fprintf(w, "kept: %s: %s\n", k.Node, k.Reason)
	}
	if len(r.Folded)+len(r.Explicit) == 0 {
		fmt.Fprintln(w, "there was no norm to fold")
	}
	_, err := fmt.Fprintf(w, "%d operations, were %d; %d parameters, were %d; outputs differ by %.1e of the largest\n%s\n",
		r.Nodes[1], r.Nodes[0], r.Parameters[1], r.Parameters[0], r.Difference, r.Output)
	return err
}
