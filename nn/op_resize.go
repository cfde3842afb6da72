package nn

import (
	"fmt"
	"math"

	"github.com/gomlx/gomlx/core/graph"
)

// Resize samples the spatial axes of [batch, spatial..., channels] anew, by nearest neighbour or (bi-, tri-)linearly,
// with ONNX's conventions. Give Size or Scale.
type Resize struct {
	Size   []int     // per spatial axis
	Scale  []float64 // per spatial axis: the output has ⌊size·scale⌋ positions
	Linear bool
	Coord  Coordinates // zero value: half_pixel
	Round  Rounding    // for nearest; zero value: round_prefer_floor
}

// Coordinates says where an output position lies in the input.
type Coordinates string

// The conventions, by their ONNX names, for output position o and scale s.
const (
	HalfPixel        Coordinates = "half_pixel"         // (o + 1/2)/s − 1/2
	Asymmetric       Coordinates = "asymmetric"         // o/s
	AlignCorners     Coordinates = "align_corners"      // o·(in − 1)/(out − 1)
	PyTorchHalfPixel Coordinates = "pytorch_half_pixel" // half_pixel, but 0 for a single output
)

// Rounding says which neighbour is nearest.
type Rounding string

// The roundings, by their ONNX names.
const (
	RoundPreferFloor Rounding = "round_prefer_floor"
	RoundPreferCeil  Rounding = "round_prefer_ceil"
	RoundFloor       Rounding = "floor"
	RoundCeil        Rounding = "ceil"
)

// Coordinates is Coord with its default.
func (d Resize) Coordinates() Coordinates {
	if d.Coord == "" {
		return HalfPixel
	}
	return d.Coord
}

// Rounding is Round with its default.
func (d Resize) Rounding() Rounding {
	if d.Round == "" {
		return RoundPreferFloor
	}
	return d.Round
}

// Factor is the scale of spatial axis i that takes in positions to out.
func (d Resize) Factor(i, in, out int) float64 {
	if i < len(d.Scale) {
		return d.Scale[i]
	}
	return float64(out) / float64(in)
}

// Kind returns "resize".
func (Resize) Kind() string { return "resize" }

// Lower samples one axis after the other; an enlargement by a whole number to the nearest is a broadcast.
func (d Resize) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	y := x[0]
	n := max(len(d.Size), len(d.Scale))
	if y.Rank() != n+2 || (len(d.Size) > 0 && len(d.Scale) > 0) {
		panic(fmt.Errorf("size %v, scale %v: give one of them, with one entry per spatial axis of %s", d.Size, d.Scale, y.Shape()))
	}
	for i := range n {
		in := y.Shape().Dimensions[i+1]
		out := 0
		if len(d.Size) > 0 {
			out = d.Size[i]
		} else {
			out = int(math.Floor(float64(in) * d.Scale[i]))
		}
		if out < 1 || in < 1 || out > 1<<20 {
			panic(fmt.Errorf("resizing %s to %d positions along spatial axis %d", y.Shape(), out, i))
		}
		if out != in || d.Factor(i, in, out) != 1 {
			y = d.axis(y, i+1, in, out, d.Factor(i, in, out))
		}
	}
	return []*graph.Node{y}
}

func (d Resize) axis(x *graph.Node, axis, in, out int, scale float64) *graph.Node {
	lo, hi, frac := make([]int32, out), make([]int32, out), make([]float32, out)
	repeats := out%in == 0
	for o := range out {
		p := d.at(o, in, out, scale)
		clamp := func(v float64) int32 { return int32(min(max(v, 0), float64(in-1))) }
		if !d.Linear {
			lo[o] = clamp(d.nearest(p))
			repeats = repeats && int(lo[o]) == o/(out/in)
			continue
		}
		p = min(max(p, 0), float64(in-1))
		lo[o], hi[o] = clamp(math.Floor(p)), clamp(math.Floor(p)+1)
		frac[o] = float32(p - math.Floor(p))
	}
	if d.Linear {
		dims := make([]int, x.Rank())
		for i := range dims {
			dims[i] = 1
		}
		dims[axis] = out
		t := graph.ConvertDType(graph.Reshape(graph.Const(x.Graph(), frac), dims...), x.DType())
		a, b := takeAxis(x, axis, lo), takeAxis(x, axis, hi)
		return graph.Add(a, graph.Mul(graph.Sub(b, a), t))
	}
	if repeats {
		s := x.Shape().Dimensions
		mid := append(append(append([]int{}, s[:axis+1]...), 1), s[axis+1:]...)
		wide := append([]int{}, mid...)
		wide[axis+1] = out / in
		end := append([]int{}, s...)
		end[axis] = out
		return graph.Reshape(graph.BroadcastToDims(graph.Reshape(x, mid...), wide...), end...)
	}
	return takeAxis(x, axis, lo)
}

// at is where output position o lies in the input.
func (d Resize) at(o, in, out int, scale float64) float64 {
	switch d.Coordinates() {
	case HalfPixel:
		return (float64(o)+.5)/scale - .5
	case PyTorchHalfPixel:
		if out == 1 {
			return 0
		}
		return (float64(o)+.5)/scale - .5
	case Asymmetric:
		return float64(o) / scale
	case AlignCorners:
		if out == 1 {
			return 0
		}
		return float64(o) * float64(in-1) / float64(out-1)
	}
	panic(fmt.Errorf("there is no coordinate convention %q; use half_pixel, pytorch_half_pixel, asymmetric or align_corners", d.Coord))
}

func (d Resize) nearest(p float64) float64 {
	switch d.Rounding() {
	case RoundPreferFloor:
		return math.Ceil(p - .5)
	case RoundPreferCeil:
		return math.Floor(p + .5)
	case RoundFloor:
		return math.Floor(p)
	case RoundCeil:
		return math.Ceil(p)
	}
	panic(fmt.Errorf("there is no rounding %q; use round_prefer_floor, round_prefer_ceil, floor or ceil", d.Round))
}
