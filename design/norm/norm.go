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
	NoGain bool    // without a learned gain, where the norm can do without
	NoBias bool    // without a learned bias, where the norm can do without
	// Steps is the length of the training. Norms that change along it take a tenth of it as warm-up, or half of it for a
	// blend; 0: each norm's own default, meant for tens of thousands of steps.
	Steps int
}

// warmup is a tenth of the steps, and def when their number is not known.
func (c Config) warmup(def int) int {
	if c.Steps > 0 {
		return max(1, c.Steps/10)
	}
	return def
}

// kind is one row of the table of layers.
type kind struct {
	name string
	what string
	make func(c Config) nn.Norm
}

var kinds = append([]kind{
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
	{"power", "PowerNorm: running quadratic mean, a backward pass of its own, groups scaled in front", func(c Config) nn.Norm {
		return PowerNorm{Eps: c.Eps, Groups: c.Groups, Warmup: c.warmup(0)}
	}},
	{"power-plain", "PowerNorm without scaled groups: folds into the next layer", func(c Config) nn.Norm {
		return PowerNorm{Eps: c.Eps, NoGroupScaling: true, Warmup: c.warmup(0)}
	}},
	{"unified", "Unified Normalization: quadratic mean smoothed over the last batches, outlier batches left out; folds", func(c Config) nn.Norm {
		d := Unified{Eps: c.Eps, FreezeOnSkip: true}
		if c.Steps > 0 {
			d.Warmup = max(c.warmup(0), 4) // fills the window
			d.CompensationStart = d.Warmup
		}
		return d
	}},
	{"repbn", "RepBN: batch norm beside a learned identity shortcut; folds", func(c Config) nn.Norm { return RepBN{Eps: c.Eps} }},
	{"prepbn", "PRepBN: layer norm that fades into RepBN along the first half of the training; folds", func(c Config) nn.Norm {
		d := PRepBN{RepBN: RepBN{Eps: c.Eps}}
		if c.Steps > 0 {
			d.Steps = max(1, c.Steps/2)
		}
		return d
	}},
}, evoNorms()...)

// evoNorms are the rows of the evolved layers.
func evoNorms() (rows []kind) {
	what := map[EvoLayer]string{
		B0: "variances of the batch and of each case",
		B1: "variance of the batch, second moment of each case",
		B2: "variance of the batch, second moment of each case, gated the other way",
		S0: "statistics of groups of each case, a learned gate",
		S1: "statistics of groups of each case",
		S2: "second moments of groups of each case",
	}
	for _, layer := range EvoLayers() {
		rows = append(rows, kind{"evonorm-" + string(layer), "EvoNorm, norm and activation in one, for convolutions: " + what[layer], func(c Config) nn.Norm {
			return EvoNorm{Layer: layer, Eps: c.Eps, Groups: c.Groups}
		}})
	}
	return rows
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

// StoredTypes are the norms of this package that a network file may name, for safetensors.ReadNetwork.
func StoredTypes() []any {
	return []any{PowerNorm{}, Unified{}, RepBN{}, PRepBN{}, EvoNorm{}, GraphNorm{}}
}
