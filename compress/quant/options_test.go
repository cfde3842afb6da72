package quant

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
)

// withOptions are the methods that any network, or any transformer, can be given, at some bits.
func withOptions(o compress.Options, weight, act int) map[string]compress.Method {
	return map[string]compress.Method{
		"repq":    RepQViT{Options: o, WeightBits: weight, ActBits: act},
		"dopq":    DopQViT{Options: o, WeightBits: weight, ActBits: act},
		"min-max": MinMaxPTQ{Options: o, WeightBits: weight, ActBits: act},
	}
}

func named(names ...string) func(*nn.Node) bool {
	return func(n *nn.Node) bool { return slices.Contains(names, n.Name) }
}

func TestSitesThatAreNotSelectedStay(t *testing.T) {
	net, x := smallViT(t, nil), images(8, 8, 8, 1)
	if _, err := SpreadChannels(net, 6, 1); err != nil {
		t.Fatal(err)
	}
	want := outputs(t, net, x)
	selected := []string{"blk.0.attn.q", "blk.1.fc1", "blk.1.fc2", "blk.0.attn.ctx"}
	for name, m := range withOptions(compress.Options{Select: named(selected...)}, 8, 8) {
		res, err := m.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(name, err)
		}
		for _, s := range res.Sites {
			bits := 32
			if slices.Contains(selected, s.Name) {
				bits = 8
			}
			if s.WeightBits != bits || s.InputBits != bits {
				t.Errorf("%s: %s has W%dA%d", name, s.Name, s.WeightBits, s.InputBits)
			}
		}
		quantisers := 0
		for _, n := range res.Network.Nodes {
			switch n.Op.(type) {
			case nn.QuantizeDequantize, LogQuantize, TanQuantize:
				quantisers++
			}
		}
		if quantisers != 5 { // of three sites and two operands
			t.Errorf("%s: %d activation quantisers", name, quantisers)
		}
		if e := compress.RelativeError(want, outputs(t, res.Network, x)); e > 1e-2 {
			t.Errorf("%s: relative error %g", name, e)
		}
	}
	for name, m := range withOptions(compress.Options{Select: named("nothing")}, 8, 8) {
		if _, err := m.Compress(context.Background(), enginetest.Backend(), net, x); err == nil || !strings.Contains(err.Error(), "selected") {
			t.Errorf("%s with no site selected: %v", name, err)
		}
	}
}

// Methods follow one another over one network, each on its sites; a site is never quantised twice.
func TestMethodsShareANetwork(t *testing.T) {
	net, x, ctx := smallViT(t, nil), images(8, 8, 8, 1), context.Background()
	want := outputs(t, net, x)
	first := func(n *nn.Node) bool {
		return strings.HasPrefix(n.Name, "blk.0.attn.q") || strings.HasPrefix(n.Name, "blk.1.")
	}
	rest := func(n *nn.Node) bool { return !first(n) }
	for name, m := range withOptions(compress.Options{Select: first}, 8, 8) {
		half, err := m.Compress(ctx, enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(name, err)
		}
		for other, m := range withOptions(compress.Options{Select: rest}, 6, 6) {
			whole, err := m.Compress(ctx, enginetest.Backend(), half.Network, x)
			if err != nil {
				t.Errorf("%s after %s: %v", other, name, err)
				continue
			}
			for _, s := range whole.Sites {
				bits := 6
				if first(net.Node(s.Name)) {
					bits = 8
				}
				if s.WeightBits != bits {
					t.Errorf("%s after %s: %s has %d bits, want %d", other, name, s.Name, s.WeightBits, bits)
				}
			}
			if e := compress.RelativeError(want, outputs(t, whole.Network, x)); e > 5e-2 {
				t.Errorf("%s after %s: relative error %g", other, name, e)
			}
		}
		for other, m := range withOptions(compress.Options{Select: first}, 8, 8) {
			if _, err := m.Compress(ctx, enginetest.Backend(), half.Network, x); err == nil || !strings.Contains(err.Error(), "already") {
				t.Errorf("%s after %s on the same sites: %v", other, name, err)
			}
		}
	}
}

func TestBitsOfSingleSites(t *testing.T) {
	net, x := smallViT(t, nil), images(8, 8, 8, 1)
	over := map[string]compress.Bits{"blk.0.attn.k": {Weight: 8, Act: 6}, "blk.1.fc2": {Weight: 3}, "head": {Act: 32}, "patch": {Act: 5}}
	for name, m := range withOptions(compress.Options{Bits: over}, 4, 4) {
		res, err := m.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(name, err)
		}
		for _, s := range res.Sites {
			want := compress.Options{Bits: over}.BitsOf(s.Name, compress.Bits{Weight: 4, Act: 4})
			if name != "min-max" && strings.HasPrefix(s.Name, "blk.0.attn.") && s.Name != "blk.0.attn.o" {
				want.Act = 6 // they share the norm's quantiser
			}
			if s.WeightBits != want.Weight || s.InputBits != want.Act {
				t.Errorf("%s: %s has W%dA%d, want %+v", name, s.Name, s.WeightBits, s.InputBits, want)
			}
		}
	}
	for _, bad := range []map[string]compress.Bits{{"no.such": {Weight: 4}}, {"head": {Weight: 9}}, {"head": {Act: 16}}, {"blk.0.norm1": {Weight: 4}}} {
		for name, m := range withOptions(compress.Options{Bits: bad}, 4, 4) {
			if _, err := m.Compress(context.Background(), enginetest.Backend(), net, x); err == nil {
				t.Errorf("%s accepts %v", name, bad)
			}
		}
	}
}

func TestWeightsAlone(t *testing.T) {
	net, x := smallViT(t, nil), images(8, 8, 8, 1)
	for name, m := range withOptions(compress.Options{}, 4, 32) {
		res, err := m.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(name, err)
		}
		if len(res.Network.Nodes) != len(net.Nodes) {
			t.Errorf("%s: %d nodes, were %d", name, len(res.Network.Nodes), len(net.Nodes))
		}
		for _, s := range res.Sites {
			if s.WeightBits != 4 || s.InputBits != 32 {
				t.Errorf("%s: %+v", name, s)
			}
		}
	}
}

// A run that stops after some sites and is begun again gives the bits of one that never stopped, and reports the sites
// that it did not compute again.
func TestAStoppedRunGoesOn(t *testing.T) {
	net, x := smallViT(t, nil), images(8, 8, 8, 1)
	for name := range withOptions(compress.Options{}, 4, 4) {
		plain, err := withOptions(compress.Options{}, 4, 4)[name].Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		journal := func() *compress.Journal {
			j, err := compress.OpenJournal(dir)
			if err != nil {
				t.Fatal(err)
			}
			return j
		}
		ctx, stop := context.WithCancel(context.Background())
		steps := 0
		_, err = withOptions(compress.Options{Journal: journal(), Progress: func(s compress.Step) {
			if steps++; steps == 5 {
				stop()
			}
		}}, 4, 4)[name].Compress(ctx, enginetest.Backend(), net, x)
		if !errors.Is(err, context.Canceled) {
			t.Fatal(name, err)
		}
		kept := journal().Len()
		if kept == 0 {
			t.Errorf("%s keeps nothing", name)
		}
		var seen []compress.Step
		again, err := withOptions(compress.Options{Journal: journal(), Progress: func(s compress.Step) { seen = append(seen, s) }}, 4, 4)[name].Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(name, err)
		}
		if !slices.Equal(outputs(t, plain.Network, x), outputs(t, again.Network, x)) {
			t.Errorf("%s: another network after a stop", name)
		}
		if len(seen) != len(plain.Sites) || seen[len(seen)-1].Done != seen[0].Total {
			t.Errorf("%s: %d steps for %d sites", name, len(seen), len(plain.Sites))
		}
	}
}

// A convolution whose batch norm is folded into it is still known by its name.
func TestAFoldedSiteKeepsItsName(t *testing.T) {
	net, x := convNet(t), images(8, 8, 8, 3)
	o := compress.Options{Bits: map[string]compress.Bits{"dw": {Weight: 5, Act: 6}}, Select: func(n *nn.Node) bool { return n.Name != "conv1" }}
	res, err := MinMaxPTQ{Options: o}.Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]compress.Bits{}
	for _, s := range res.Sites {
		got[s.Name] = compress.Bits{Weight: s.WeightBits, Act: s.InputBits}
	}
	if got["conv1"].Weight != 32 || got["dw"] != (compress.Bits{Weight: 5, Act: 6}) || got["pw"].Weight != 8 {
		t.Errorf("%v", got)
	}
}
