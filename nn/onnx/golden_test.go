package onnx_test

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// golden is what test/peers/onnx_golden.py stored of ONNX Runtime's outputs.
type golden struct {
	Cases []struct {
		Name, File, Input, Kind string
		Shape                   []int
		Outputs                 []struct {
			Name   string
			Shape  []int
			Max    float64
			Step   int
			Values []float64
		}
	}
}

// goldenInput repeats values of onnx_golden.py.
func goldenInput(kind string, shape []int) *tensors.Tensor {
	n := 1
	for _, d := range shape {
		n *= d
	}
	mix := func(h uint64) uint64 { return (h ^ h>>15) * 2246822519 % (1 << 32) }
	hash := func(i int) uint64 {
		return mix((uint64(i)*2654435761 + 12345) % (1 << 32))
	}
	if kind == "page" {
		v := make([]float32, n)
		c, h, w := shape[1], shape[2], shape[3]
		for i := range v {
			x, y, k := i%w, i/w%h, i/(w*h*c)
			row, line := y/10, y%10
			spot := mix(uint64(x/3*2654435761+row*40503+k*977+line/3*7919) % (1 << 32))
			if v[i] = 2; row%2 == 1 && line >= 2 && spot>>8%2 != 0 && x >= 16 && x < w-16 {
				v[i] = -2
			}
		}
		return tensors.FromFlatDataAndDimensions(v, shape...)
	}
	if kind == "bytes" {
		v := make([]int32, n)
		for i := range v {
			v[i] = int32(hash(i) >> 8 % 257)
		}
		return tensors.FromFlatDataAndDimensions(v, shape...)
	}
	v := make([]float32, n)
	for i := range v {
		noise := float32(hash(i)>>8)/(1<<23) - 1
		wave := float32(i/7%64)/32 - 1
		v[i] = (noise + wave) / 2
	}
	return tensors.FromFlatDataAndDimensions(v, shape...)
}

func readGolden(t *testing.T) golden {
	t.Helper()
	b, err := os.ReadFile("testdata/golden.json")
	if err != nil {
		t.Fatal(err)
	}
	var g golden
	if err := json.Unmarshal(b, &g); err != nil {
		t.Fatal(err)
	}
	return g
}

func backend(t *testing.T) compute.Backend {
	t.Helper()
	return enginetest.Backend()
}

// TestRealModelsAgreeWithONNXRuntime reads each model once and runs it at batch 1 and 3.
func TestRealModelsAgreeWithONNXRuntime(t *testing.T) {
	nets := map[string]*nn.Network{}
	for _, c := range readGolden(t).Cases {
		t.Run(c.Name+"/"+string(rune('0'+c.Shape[0])), func(t *testing.T) {
			set := c.File[:strings.IndexByte(c.File, '/')]
			data.RequireTest(t, set)
			net := nets[c.Name]
			if net == nil {
				var err error
				net, err = onnx.ReadFile(filepath.Join(data.Dir(), "models", filepath.FromSlash(c.File)), onnx.Options{
					Dims: map[string][]int{c.Input: append([]int{0}, c.Shape[1:]...)},
				})
				if err != nil {
					t.Fatal(err)
				}
				nets[c.Name] = net
			}
			got, err := net.Run(backend(t), []*tensors.Tensor{goldenInput(c.Kind, c.Shape)})
			if err != nil {
				t.Fatal(err)
			}
			for i, want := range c.Outputs {
				if net.Outputs[i] != want.Name || !slices.Equal(got[i].Shape().Dimensions, want.Shape) {
					t.Fatalf("output %d is %q %v, want %q %v", i, net.Outputs[i], got[i].Shape(), want.Name, want.Shape)
				}
				y := nn.Floats(got[i])
				worst := 0.
				for j, w := range want.Values {
					// 1e-4 relative, with a floor of 1e-2 of the largest output: below, the terms of a sum cancel
					e := math.Abs(float64(y[j*want.Step])-w) / math.Max(math.Abs(w), 1e-2*want.Max)
					worst = math.Max(worst, e)
				}
				t.Logf("%s: largest relative difference %.2g", want.Name, worst)
				if !(worst <= 1e-4) {
					t.Errorf("%s: largest relative difference %.3g, want at most 1e-4", want.Name, worst)
				}
			}
		})
	}
}
