package quant

import (
	"context"
	"math"
	"slices"
	"testing"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
)

// The blame of a site equals what a run of the method on that site alone costs, where the site's grids do not depend on
// the other sites: min-max fits them to the float network.
func TestBlameIsTheLossOfASiteAlone(t *testing.T) {
	ctx, be := context.Background(), enginetest.Backend()
	for name, net := range map[string]*nn.Network{"vit": smallViT(t, nil), "conv": convNet(t)} {
		x := images(12, 8, 8, 1)
		if name == "conv" {
			x = images(12, 8, 8, 3)
		}
		res, err := MinMaxPTQ{WeightBits: 3, ActBits: 4}.Compress(ctx, be, net, x)
		if err != nil {
			t.Fatal(err)
		}
		blame, err := compress.Blamer{}.Measure(ctx, be, res.Reference, res.Network, x)
		if err != nil {
			t.Fatal(err)
		}
		if len(blame) != len(res.Sites) {
			t.Errorf("%s: %d sites are blamed of %d", name, len(blame), len(res.Sites))
		}
		want := outputs(t, net, x)
		for i, b := range blame {
			if i > 0 && b.KL > blame[i-1].KL {
				t.Errorf("%s: %s comes after %s", name, b.Site, blame[i-1].Site)
			}
			alone, err := MinMaxPTQ{Options: compress.Options{Select: named(b.Site)}, WeightBits: 3, ActBits: 4}.Compress(ctx, be, net, x)
			if err != nil {
				t.Fatal(err)
			}
			a, err := compress.Compare(want, outputs(t, alone.Network, x), 12, len(want)/12)
			if err != nil {
				t.Fatal(err)
			}
			if math.Abs(a.KL-b.KL) > 1e-6+.02*a.KL {
				t.Errorf("%s: %s costs %g nats alone, and is blamed for %g", name, b.Site, a.KL, b.KL)
			}
			s := res.Sites[slices.IndexFunc(res.Sites, func(s compress.Site) bool { return s.Name == b.Site })]
			if b.Bytes != s.FloatBytes-s.Bytes {
				t.Errorf("%s: leaving %s out costs %d bytes, and it is stored in %d of %d", name, b.Site, b.Bytes, s.Bytes, s.FloatBytes)
			}
		}
	}
}

// A norm that gave its scale to a site goes with it: the blame at 8 bits is small, whatever the reparameterisation.
func TestBlameTakesTheNormAlong(t *testing.T) {
	ctx, be, x := context.Background(), enginetest.Backend(), images(12, 8, 8, 1)
	net := smallViT(t, nil)
	if _, err := SpreadChannels(net, 6, 1); err != nil {
		t.Fatal(err)
	}
	res, err := RepQViT{WeightBits: 8, ActBits: 8}.Compress(ctx, be, net, x)
	if err != nil {
		t.Fatal(err)
	}
	before := outputs(t, res.Reference, x)
	blame, err := compress.Blamer{}.Measure(ctx, be, res.Reference, res.Network, x)
	if err != nil {
		t.Fatal(err)
	}
	if len(blame) != len(res.Sites) {
		t.Errorf("%d of %d sites", len(blame), len(res.Sites))
	}
	for _, b := range blame {
		if !(b.KL < 1e-4) || b.Note != "" {
			t.Errorf("%+v", b)
		}
	}
	if !slices.Equal(before, outputs(t, res.Reference, x)) {
		t.Error("the reference has changed")
	}
}
