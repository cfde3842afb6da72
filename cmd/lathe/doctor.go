package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/kernel"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/lab/store"
)

// diagnosis is what doctor finds.
type diagnosis struct {
	Build    lab.Build       `json:"build"`
	Go       string          `json:"go"`
	CPU      engine.CPU      `json:"cpu"`
	Threads  int             `json:"threads"`
	Kernels  kernels         `json:"kernels"`
	SIMD     bool            `json:"simd"` // built with GOEXPERIMENT=simd
	Backends []engine.Status `json:"backends"`
	Chosen   string          `json:"chosen"`
	Reason   string          `json:"reason"`
	Cache    string          `json:"cache"`
	Offline  bool            `json:"offline"`
	Data     map[string]bool `json:"data"` // data set or model: is it here
	Store    string          `json:"store"`
	Problems []string        `json:"problems"` // with their remedies
}

// kernels says how the native backend computes here.
type kernels struct {
	Level         string `json:"level"`
	Reason        string `json:"reason"` // what the processor said of itself, and what LATHE_ISA did
	Threads       int    `json:"threads"`
	ThreadsReason string `json:"threads_reason"`
}

func theseKernels() kernels {
	level, reason := kernel.Detect()
	k := kernels{Level: level.String(), Reason: reason, Threads: kernel.DefaultThreads()}
	procs := fmt.Sprintf("the %d processors that this process may use", runtime.GOMAXPROCS(0))
	if v := os.Getenv("GOMAXPROCS"); v == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		procs = "GOMAXPROCS=" + v
	}
	switch v := os.Getenv(kernel.EnvThreads); {
	case v == "":
		k.ThreadsReason = fmt.Sprintf("%s; %s sets another number", procs, kernel.EnvThreads)
	case v == strconv.Itoa(k.Threads):
		k.ThreadsReason = kernel.EnvThreads + "=" + v
	default:
		k.ThreadsReason = fmt.Sprintf("%s; %s=%q is not a positive number and is ignored", procs, kernel.EnvThreads, v)
	}
	return k
}

func newDoctorCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Say what computes here and why, what is missing, and how to make it faster",
		Long: `Look at this machine: the processor, the level of the native kernels, their threads and why, the backends and
which one is chosen and why, the data cache and the store of runs. Problems come with their remedies. Exit code 1 when something does not work at all.`,
		Example: `  lathe doctor
  LATHE_BACKEND=go lathe doctor
  lathe doctor --json`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			d, err := a.diagnose()
			if printErr := a.emit(d, func(w io.Writer) error { return a.printDiagnosis(w, d) }); printErr != nil {
				return printErr
			}
			return err
		},
	}
}

// diagnose collects the facts; the error says what does not work at all.
func (a *app) diagnose() (d diagnosis, failure error) {
	d = diagnosis{
		Build: lab.ThisBuild(), Go: runtime.Version(), CPU: engine.ThisCPU(), Threads: runtime.GOMAXPROCS(0), Kernels: theseKernels(), SIMD: engine.SIMD, Backends: engine.Backends(),
		Cache: data.Dir(), Offline: data.Offline(), Data: map[string]bool{}, Problems: []string{},
	}
	choice, err := engine.Choose(a.backendName)
	if err != nil {
		failure = err
		d.Problems = append(d.Problems, err.Error())
	} else {
		d.Chosen, d.Reason = choice.Name, choice.Reason
		if _, err := a.backend(); err != nil {
			failure = err
			d.Problems = append(d.Problems, err.Error())
		}
	}
	if !d.SIMD && d.Chosen == "go" {
		d.Problems = append(d.Problems, "this lathe was built without GOEXPERIMENT=simd, so backend go runs its matrix products at a fraction of their speed: rebuild with \"GOEXPERIMENT=simd go install github.com/lathe-ml/lathe/cmd/lathe@latest\"")
	}
	if d.SIMD && d.Chosen != "go" {
		d.Problems = append(d.Problems, "this lathe was built with GOEXPERIMENT=simd, which only backend go needs, and which makes exponentials outside the kernels a hundred times slower: rebuild without it")
	}
	if d.Threads < d.CPU.Cores {
		d.Problems = append(d.Problems, fmt.Sprintf("GOMAXPROCS lets lathe use %d of %d cores", d.Threads, d.CPU.Cores))
	}
	for _, e := range data.List() {
		d.Data[e.Name] = data.Have(e.Name)
	}
	if d.Store, err = store.DefaultDir(); err == nil {
		var s *store.Store
		if s, err = store.Open(d.Store); err == nil {
			err = s.Close()
		}
	}
	if err != nil {
		failure = err
		d.Problems = append(d.Problems, err.Error())
	}
	return d, failure
}

func (a *app) printDiagnosis(w io.Writer, d diagnosis) error {
	doc := report.Document{Title: "lathe " + d.Build.Version + ", " + d.Go}
	simd := "yes"
	if !d.SIMD {
		simd = "no"
	}
	var have, missing []string
	for name, here := range d.Data {
		if here {
			have = append(have, name)
		} else {
			missing = append(missing, name)
		}
	}
	slices.Sort(have)
	slices.Sort(missing)
	machine := report.Table{Title: "Machine", Columns: []string{"", ""}}
	machine.Rows = [][]string{
		{"processor", d.CPU.Model},
		{"features", strings.Join(d.CPU.Features, " ")},
		{"threads", fmt.Sprintf("%d of %d cores", d.Threads, d.CPU.Cores)},
		{"native kernels", fmt.Sprintf("%s: %s", d.Kernels.Level, d.Kernels.Reason)},
		{"native threads", fmt.Sprintf("%d: %s", d.Kernels.Threads, d.Kernels.ThreadsReason)},
		{"simd", simd + " (GOEXPERIMENT=simd at build time)"},
	}
	backends := report.Table{Title: "Backends, best first", Columns: []string{"name", "usable", "why"}}
	for i, b := range d.Backends {
		usable := "yes"
		if !b.Available {
			usable = "no"
		}
		if b.Name == d.Chosen {
			usable += ", chosen"
			backends.Strong = append(backends.Strong, i)
		}
		backends.Rows = append(backends.Rows, []string{b.Name, usable, b.Reason})
	}
	if d.Chosen != "" {
		backends.Note = fmt.Sprintf("Chosen: %s (%s). Another: --backend NAME or %s=NAME.", d.Chosen, d.Reason, engine.EnvBackend)
	}
	places := report.Table{Title: "Files", Columns: []string{"", ""}}
	cache := d.Cache
	if d.Offline {
		cache += " (LATHE_OFFLINE: nothing is fetched)"
	}
	places.Rows = [][]string{{"data cache", cache}, {"here", strings.Join(have, ", ")}}
	if len(missing) > 0 {
		places.Rows = append(places.Rows, []string{"not here", strings.Join(missing, ", ")})
		places.Note = "Data sets are fetched when they are needed; \"lathe data fetch NAME\" fetches one now."
	}
	places.Rows = append(places.Rows, []string{"runs", d.Store})
	doc.Add(machine, backends, places)
	if len(d.Problems) > 0 {
		doc.Add(report.Text{Title: "To mend", Paragraphs: d.Problems})
	} else {
		doc.Add(report.Text{Paragraphs: []string{"Nothing to mend."}})
	}
	if os.Getenv(engine.EnvBackend) != "" && a.backendName != "" {
		doc.Add(report.Text{Paragraphs: []string{"--backend wins over " + engine.EnvBackend + "."}})
	}
	return doc.WriteText(w, a.width())
}
