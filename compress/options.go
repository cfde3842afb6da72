package compress

import (
	"fmt"
	"maps"
	"slices"

	"github.com/lathe-ml/lathe/nn"
)

// Options are what every method takes beside its own knobs. The zero value compresses all sites alike, silently, and
// keeps nothing for a later run.
type Options struct {
	// Select says which sites are compressed; the others stay as they are. nil: all.
	Select func(site *nn.Node) bool
	// Bits overrides the method's bits for single sites, by name. A zero means the method's own.
	Bits map[string]Bits
	// Seed of everything that is drawn.
	Seed uint64
	// Journal keeps the finished sites, so that a stopped run goes on where it was. nil: nothing is kept.
	Journal *Journal
	// Progress, if not nil, is called after each site.
	Progress func(Step)
}

// Bits are the bits of a site's weight and of the activation that it reads, 32 for float.
type Bits struct {
	Weight int `json:"weight" yaml:"weight,omitempty"`
	Act    int `json:"activation" yaml:"activation,omitempty"`
}

// Step is a finished site of a running compression.
type Step struct {
	Site        string
	Done, Total int
	Bytes       int64   // of the weight as stored; 0: not known yet
	Err         float64 // relative squared error of the weight or of the site's output, whichever the method measures
	Restored    bool    // it came from the journal
}

// Selected says whether the options let a method touch the site.
func (o Options) Selected(n *nn.Node) bool { return o.Select == nil || o.Select(n) }

// BitsOf returns a site's bits: the override where there is one, else those given.
func (o Options) BitsOf(site string, def Bits) Bits {
	if b, ok := o.Bits[site]; ok {
		if b.Weight != 0 {
			def.Weight = b.Weight
		}
		if b.Act != 0 {
			def.Act = b.Act
		}
	}
	return def
}

// Check reports overrides that name no site of the network.
func (o Options) Check(net *nn.Network) error {
	for _, name := range slices.Sorted(maps.Keys(o.Bits)) {
		n := net.Node(name)
		if n == nil {
			return fmt.Errorf("compress: bits are given for %q, which is no node of the network", name)
		}
		if _, ok := n.Op.(nn.Linear); !ok {
			return fmt.Errorf("compress: bits are given for %q, which is a %s without a weight", name, n.Op.Kind())
		}
	}
	return nil
}

// Report calls Progress, if there is one.
func (o Options) Report(s Step) {
	if o.Progress != nil {
		o.Progress(s)
	}
}
