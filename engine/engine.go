// Package engine chooses what computes and runs graphs on it.
//
// Three backends can stand behind it: native, Lathe's own for CPUs; xla, where a PJRT plugin for an accelerator is
// installed; and go, GoMLX's portable backend, which needs nothing, works everywhere and is the oracle for the others.
package engine

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/gobackend"

	"github.com/lathe-ml/lathe/engine/native"
)

// EnvBackend is the environment variable that names the backend when no flag does.
const EnvBackend = "LATHE_BACKEND"

// A candidate is one backend that this build knows.
type candidate struct {
	name string
	// available says why the backend can be used here ("AVX2 found"), or, with ok false, why not and what to do.
	available func() (reason string, ok bool)
	// preferred backends are chosen without being asked for.
	preferred func() bool
	open      func(config string) (compute.Backend, error)
}

var goCandidate = candidate{
	name:      "go",
	available: func() (string, bool) { return "always there" + goKernels(), true },
	preferred: func() bool { return true },
	open:      gobackend.New,
}

var nativeCandidate = candidate{
	name:      native.Name,
	available: native.Available,
	preferred: func() bool { return true },
	open:      func(config string) (compute.Backend, error) { return native.New(config) },
}

// candidates lists the backends in order of preference.
func candidates() []candidate {
	return append(slices.Clone(extraCandidates), nativeCandidate, goCandidate)
}

// Open returns the backend of that name ("go", "native", "xla", with an optional ":config"), or, for "", the one that
// LATHE_BACKEND names, or else the best that is here. Backends are opened once per process and shared.
func Open(name string) (compute.Backend, error) {
	c, err := Choose(name)
	if err != nil {
		return nil, err
	}
	return opened(c.Name, c.Config)
}

// Choice is the backend that Open would take, and why.
type Choice struct{ Name, Config, Reason string }

// Choose decides like Open, without opening anything.
func Choose(name string) (Choice, error) {
	source := "asked for"
	if name == "" {
		name, source = os.Getenv(EnvBackend), EnvBackend+" is set"
	}
	if name != "" {
		short, config, _ := strings.Cut(name, ":")
		for _, c := range candidates() {
			if c.name == short {
				if reason, ok := c.available(); !ok {
					return Choice{}, fmt.Errorf("engine: backend %q cannot be used: %s", short, reason)
				}
				return Choice{short, config, source}, nil
			}
		}
		return Choice{}, fmt.Errorf("engine: there is no backend %q in this build; use one of %s", short, strings.Join(Names(), ", "))
	}
	for _, c := range candidates() {
		if reason, ok := c.available(); ok && c.preferred() {
			return Choice{Name: c.name, Reason: reason}, nil
		}
	}
	return Choice{}, errors.New("engine: no backend can be used")
}

// Names lists the backends that this build knows, best first.
func Names() (names []string) {
	for _, c := range candidates() {
		names = append(names, c.name)
	}
	return names
}

// Status says of one backend whether it can be used, and why or why not.
type Status struct {
	Name      string `json:"name"`
	Available bool   `json:"available"`
	Reason    string `json:"reason"`
}

// Backends reports on all backends that this build knows, best first.
func Backends() (all []Status) {
	for _, c := range candidates() {
		reason, ok := c.available()
		all = append(all, Status{c.name, ok, reason})
	}
	return all
}

var (
	openMu sync.Mutex
	open   = map[string]compute.Backend{}
)

func opened(name, config string) (compute.Backend, error) {
	openMu.Lock()
	defer openMu.Unlock()
	key := name + ":" + config
	if b := open[key]; b != nil && !b.IsFinalized() {
		return b, nil
	}
	for _, c := range candidates() {
		if c.name == name {
			b, err := c.open(config)
			if err != nil {
				return nil, fmt.Errorf("engine: opening backend %q: %w", name, err)
			}
			open[key] = b
			return b, nil
		}
	}
	return nil, fmt.Errorf("engine: there is no backend %q", name)
}

// Go returns the portable backend. It serves for shape inference and as the reference in tests.
func Go() compute.Backend {
	b, err := opened("go", "")
	if err != nil {
		panic(err) // the portable backend has nothing that can fail
	}
	return b
}

// GatherConvolution says whether convolutions should be lowered to a gather of patches and a product: the backend's
// own convolution is slower than that.
func GatherConvolution(b compute.Backend) bool { return Name(b) == "go" }

// Name is the short name of an open backend: "go", "native", "xla".
func Name(b compute.Backend) string {
	if n := b.Name(); n != "Go Backend" { // what GoMLX's portable backend calls itself
		return n
	}
	return "go"
}
