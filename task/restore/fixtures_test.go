package restore

import (
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data/imaging"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/nn"
)

// eval runs a graph function on the portable backend.
func eval(t *testing.T, f func(x []*graph.Node) []*graph.Node, args ...*tensors.Tensor) []*tensors.Tensor {
	t.Helper()
	ex, err := engine.NewExec(enginetest.Backend(), f)
	if err != nil {
		t.Fatal(err)
	}
	defer ex.Finalize()
	a := make([]any, len(args))
	for i, x := range args {
		a[i] = x
	}
	out, err := ex.Call(a...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func toNHWC(x *graph.Node) *graph.Node { return graph.TransposeAllAxes(x, 0, 2, 3, 1) }
func toNCHW(x *graph.Node) *graph.Node { return graph.TransposeAllAxes(x, 0, 3, 1, 2) }

func order(t *testing.T, v fixture.Value) nn.ShuffleOrder {
	t.Helper()
	o, err := nn.ParseShuffleOrder(v.String())
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func picture(v fixture.Value) *imaging.Image {
	m := &imaging.Image{H: v.Shape[0], W: v.Shape[1], C: 1, Pix: v.Float32s()}
	if len(v.Shape) == 3 {
		m.C = v.Shape[2]
	}
	return m
}

func pictureTensor(m *imaging.Image, shape ...int) *tensors.Tensor {
	return tensors.FromFlatDataAndDimensions(m.Pix, shape...)
}

// transposedConv is the definition: every input pixel adds its multiple of the kernel [in, out, k, k] to the output.
func transposedConv(x []float64, n, h, w int, kernel []float32, out, k, stride, pad int) []float64 {
	oh, ow := (h-1)*stride+k-2*pad, (w-1)*stride+k-2*pad
	y := make([]float64, out*oh*ow)
	for ci := range n {
		for r := range h {
			for c := range w {
				for co := range out {
					for a := range k {
						for b := range k {
							p, q := r*stride+a-pad, c*stride+b-pad
							if p >= 0 && p < oh && q >= 0 && q < ow {
								y[(co*oh+p)*ow+q] += x[(ci*h+r)*w+c] * float64(kernel[((ci*out+co)*k+a)*k+b])
							}
						}
					}
				}
			}
		}
	}
	return y
}

func TestFixtures(t *testing.T) {
	fixture.Run(t, 43, map[string]fixture.Func{
		"pixel_shuffle": func(t *testing.T, c *fixture.Case) map[string]any {
			y := eval(t, func(x []*graph.Node) []*graph.Node {
				return []*graph.Node{toNCHW(PixelShuffle(toNHWC(x[0]), c.Params["r"].Int(), order(t, c.Params["order"])))}
			}, c.Inputs["x"].Tensor(c.DType()))
			return map[string]any{"y": y[0]}
		},
		"pixel_unshuffle": func(t *testing.T, c *fixture.Case) map[string]any {
			y := eval(t, func(x []*graph.Node) []*graph.Node {
				return []*graph.Node{toNCHW(PixelUnshuffle(toNHWC(x[0]), c.Params["r"].Int(), order(t, c.Params["order"])))}
			}, c.Inputs["x"].Tensor(c.DType()))
			return map[string]any{"y": y[0]}
		},
		"espcn_forward": func(t *testing.T, c *fixture.Case) map[string]any {
			p := func(name string) int { return c.Params[name].Int() }
			m := ESPCN{
				Factor: p("r"), Channels: p("c"), Widths: []int{p("n1"), p("n2")}, Kernels: []int{p("f1"), p("f2"), p("f3")},
				Activation: c.Params["activation"].String(), Order: order(t, c.Params["shuffle_order"]),
			}
			net, err := m.Network(1)
			if err != nil {
				t.Fatal(err)
			}
			weights := map[string]string{"conv1": "1", "conv2": "2", "features": "3"}
			args := []*tensors.Tensor{c.Inputs["x"].Tensor(dtypes.Float64)}
			names := []string{}
			for layer, i := range weights {
				names = append(names, layer+".w", layer+".b")
				args = append(args, c.Inputs["w"+i].Tensor(dtypes.Float64), c.Inputs["b"+i].Tensor(dtypes.Float64))
			}
			out := eval(t, func(x []*graph.Node) []*graph.Node {
				env := &nn.Env{G: x[0].Graph(), DType: dtypes.Float64, Tap: map[string]*graph.Node{}, Param: func(name string) *graph.Node {
					for i, n := range names {
						if n != name {
							continue
						}
						if v := x[i+1]; v.Rank() == 4 { // [out, in, kh, kw] -> [out, kh, kw, in]
							return graph.TransposeAllAxes(v, 0, 2, 3, 1)
						}
						return x[i+1]
					}
					t.Fatalf("the network asks for parameter %q", name)
					return nil
				}}
				y := net.Lower(env, map[string]*graph.Node{"lr": toNHWC(x[0])})
				return []*graph.Node{toNCHW(env.Tap["features"]), toNCHW(y[0])}
			}, args...)
			return map[string]any{"lr_features": out[0], "y": out[1]}
		},
		"subpixel_to_deconv": func(t *testing.T, c *fixture.Case) map[string]any {
			w, x := c.Inputs["w"], c.Inputs["x"]
			r, out, k, in := c.Params["r"].Int(), c.Params["c"].Int(), c.Params["k"].Int(), w.Shape[1]
			o := order(t, c.Params["order"])
			kernel, pad, err := SubPixelToDeconv(w.Float32s(), out, in, k, r, o)
			if err != nil {
				t.Fatal(err)
			}
			if pad != c.Params["deconv_padding"].Int() {
				t.Errorf("padding %d, want %v", pad, c.Params["deconv_padding"])
			}
			back, _, err := DeconvToSubPixel(kernel, out, in, k, r, o)
			if err != nil {
				t.Fatal(err)
			}
			for i, v := range w.Float32s() {
				if back[i] != v {
					t.Fatalf("weight %d is %v after both conversions, was %v", i, back[i], v)
				}
			}
			h, wd := x.Shape[2], x.Shape[3]
			y := transposedConv(x.Floats(), in, h, wd, kernel, out, k*r, r, pad)
			return map[string]any{
				"kernel": tensors.FromFlatDataAndDimensions(kernel, in, out, k*r, k*r),
				"y":      tensors.FromFlatDataAndDimensions(y, 1, out, h*r, wd*r),
			}
		},
		"bicubic_resize": func(t *testing.T, c *fixture.Case) map[string]any {
			m, err := imaging.Bicubic(picture(c.Inputs["x"]), c.Params["scale_h"].Float(), c.Params["scale_w"].Float(), c.Params["antialias"].Bool())
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"y": pictureTensor(m, m.H, m.W, m.C)}
		},
		"y_psnr": func(t *testing.T, c *fixture.Case) map[string]any {
			var y, inner [2]*imaging.Image
			for i, name := range []string{"a", "b"} {
				var err error
				if y[i], err = imaging.Luma(picture(c.Inputs[name])); err != nil {
					t.Fatal(err)
				}
				if inner[i], err = y[i].Shave(c.Params["border"].Int()); err != nil {
					t.Fatal(err)
				}
			}
			psnr, err := metric.PSNR(inner[0].Pix, inner[1].Pix, 1)
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"ya": pictureTensor(y[0], y[0].H, y[0].W), "yb": pictureTensor(y[1], y[1].H, y[1].W), "psnr": psnr}
		},
		"gaussian_degrade": func(t *testing.T, c *fixture.Case) map[string]any {
			r := c.Params["r"].Int()
			m, err := imaging.Decimation{
				Factor: r, Sigma: c.Params["sigma"].Float(), Radius: c.Params["radius"].Int(), Offset: c.Params["phase"].Int() - r/2,
			}.Apply(picture(c.Inputs["x"]))
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"y": pictureTensor(m, m.H, m.W)}
		},
		"preshuffled_mse": func(t *testing.T, c *fixture.Case) map[string]any {
			out := eval(t, func(x []*graph.Node) []*graph.Node {
				l := PreShuffledMSE(toNHWC(x[0]), toNHWC(x[1]), c.Params["r"].Int(), order(t, c.Params["order"]))
				return []*graph.Node{l, graph.Gradient(l, x[0])[0]}
			}, c.Inputs["pred_lr"].Tensor(dtypes.Float64), c.Inputs["target_hr"].Tensor(dtypes.Float64))
			return map[string]any{"loss": out[0], "grad_pred_lr": out[1]}
		},
	})
}
