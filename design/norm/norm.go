// Package norm is the family of normalisation layers: one type per method, all of them usable wherever a network has a
// norm slot.
package norm

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/nn"
)

// Config holds what the layers have in common. The zero value is each layer's default.
type Config struct {
	Eps    float64 // inside the root; 0: the layer's default (1e-5, RMS 1e-6)
	Groups int     // of GroupNorm; 0: 8
	NoGain bool    // without a learned gain
	NoBias bool    // without a learned bias
}

// kind is one row of the table of layers.
type kind struct {
	name string
	what string
	make func(c Config) nn.Norm
}

var kinds = []kind{
	{"none", "no normalisation", func(Config) nn.Norm { return None{} }},
	{"batch", "batch norm: statistics of the batch, running averages at inference", func(c Config) nn.Norm {
		return nn.BatchNorm{Eps: c.Eps, NoAffine: c.NoGain && c.NoBias}
	}},
	{"layer", "layer norm: statistics of each case", func(c Config) nn.Norm {
		return nn.LayerNorm{Eps: c.Eps, NoGain: c.NoGain, NoBias: c.NoBias}
	}},
	{"rms", "RMS norm: layer norm without centring or bias", func(c Config) nn.Norm {
		return nn.RMSNorm{Eps: c.Eps, NoGain: c.NoGain}
	}},
	{"group", "group norm: statistics of groups of channels of each case", func(c Config) nn.Norm {
		return nn.GroupNorm{Groups: cmp.Or(c.Groups, 8), Eps: c.Eps, NoAffine: c.NoGain && c.NoBias}
	}},
}

// Names lists the kinds that New knows.
func Names() (names []string) {
	for _, k := range kinds {
		names = append(names, k.name)
	}
	return names
}

// Describe says in a few words what a kind is.
func Describe(name string) string {
	if i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == name }); i >= 0 {
		return kinds[i].what
	}
	return ""
}

// New returns a norm by name: the one switch that all networks share.
func New(name string, c Config) (nn.Norm, error) {
	if c.Eps < 0 || c.Groups < 0 {
		return nil, fmt.Errorf("norm: eps %g, groups %d: want at least 0", c.Eps, c.Groups)
	}
	for _, k := range kinds {
		if k.name == name {
			return k.make(c), nil
		}
	}
	return nil, fmt.Errorf("norm: there is no %q; use one of %s", name, strings.Join(Names(), ", "))
}

var errNegativeEps = errors.New("eps is negative")
