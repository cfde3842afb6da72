package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/kernel"
	"github.com/lathe-ml/lathe/internal/stat"
)

// Contestant computes training steps in a process of its own.
type Contestant struct {
	Name string
	// Command gives the program and its arguments. It prints one JSON line, a Step; other lines may stand before it.
	Command func(network string, threads, steps int) []string
}

// Options say what Compare measures.
type Options struct {
	Networks []string
	Threads  []int
	Rounds   int // every contestant runs once in each; ratios are paired by round
	Steps    int // timed per run
	// Machine is the command that measures the machine: given a number of threads it prints a Machine as a JSON line.
	Machine func(threads int) []string
	// Progress is called before every run. It may be nil.
	Progress func(done, total int, what string)
}

// Result is one comparison. Rows are in the order of networks, threads and contestants.
type Result struct {
	Date        string     `json:"date"`
	CPU         engine.CPU `json:"cpu"`
	Level       string     `json:"level"` // of the native backend's kernels
	Rounds      int        `json:"rounds"`
	Steps       int        `json:"steps"`
	Contestants []string   `json:"contestants"`
	Machines    []Machine  `json:"machines"`
	Work        []Work     `json:"work"`
	Rows        []Row      `json:"rows"`
	Interrupted bool       `json:"interrupted,omitempty"` // the rows are those of the networks that were done
}

// Row is one network on one contestant with a number of threads. Times are medians over the rounds of medians over the
// steps of a run.
type Row struct {
	Network    string  `json:"network"`
	Threads    int     `json:"threads"`
	Contestant string  `json:"contestant"`
	Version    string  `json:"version,omitempty"`
	CPU        float64 `json:"cpu_ms"`
	Wall       float64 `json:"wall_ms"`
	First      float64 `json:"first_ms"`       // the first step, with what is compiled for it
	FirstWorst float64 `json:"first_worst_ms"` // of all rounds: caches on disk are empty in the first
	RSS        float64 `json:"rss_mb"`         // peak of the process, the most of all rounds
	// Ratio is the processor time of this contestant over the first one's: median of the paired rounds, least and most.
	Ratio float64 `json:"ratio"`
	Low   float64 `json:"ratio_low"`
	High  float64 `json:"ratio_high"`
	// Share is the part of the roofline that is reached: the time that the machine must take at least over Wall.
	Share float64 `json:"roofline_share"`
	Error string  `json:"error,omitempty"` // why there are no figures
}

// Compile is what the first step takes more than the others, in milliseconds: its compilation.
func (r *Row) Compile() float64 { return max(0, r.First-r.Wall) }

// Compare runs all contestants on all networks, interleaved. When ctx ends it returns what is complete, with the error.
// A contestant that fails on its first network ends the comparison; one that fails later loses that network.
func Compare(ctx context.Context, all []Contestant, o Options) (*Result, error) {
	if len(all) == 0 || len(o.Networks) == 0 || len(o.Threads) == 0 || o.Rounds < 1 || o.Steps < 1 {
		return nil, errors.New("bench: nothing to compare: want contestants, networks, threads, rounds and steps")
	}
	// What compilers keep on disk is thrown away afterwards, so that the first round's first step is an honest one.
	cache, err := os.MkdirTemp("", "lathe-bench")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(cache)
	level, _ := kernel.Detect()
	r := &Result{Date: time.Now().UTC().Format(time.DateOnly), CPU: engine.ThisCPU(), Level: level.String(), Rounds: o.Rounds, Steps: o.Steps}
	for _, c := range all {
		r.Contestants = append(r.Contestants, c.Name)
	}
	for _, n := range o.Networks {
		network, err := Find(n)
		if err != nil {
			return nil, err
		}
		w, err := network.Work()
		if err != nil {
			return nil, err
		}
		r.Work = append(r.Work, w)
	}
	for _, t := range o.Threads {
		r.Machines = append(r.Machines, Machine{Threads: t})
	}
	done, total := 0, len(o.Networks)*len(o.Threads)*o.Rounds*len(all)
	for _, w := range r.Work {
		if err := r.measure(ctx, o, cache); err != nil {
			return r.end(ctx, err)
		}
		runs := make([][]Step, len(o.Threads)*len(all)) // by threads, then contestant
		failed := make([]error, len(runs))
		for range o.Rounds {
			for i, t := range o.Threads {
				for j, c := range all {
					if o.Progress != nil {
						o.Progress(done, total, fmt.Sprintf("%s on %s, %d threads", w.Network, c.Name, t))
					}
					done++
					k := i*len(all) + j
					if failed[k] != nil {
						continue
					}
					var s Step
					err := process(ctx, c.Command(w.Network, t, o.Steps), t, cache, &s)
					if err == nil && !(s.CPU > 0 && s.Wall > 0) {
						err = errors.New("it measured no time")
					}
					if err == nil {
						runs[k] = append(runs[k], s)
						continue
					}
					err = fmt.Errorf("bench: %s on %s, %d threads: %w", w.Network, c.Name, t, err)
					if ctx.Err() != nil || j == 0 || len(r.Rows) == 0 {
						return r.end(ctx, err)
					}
					failed[k] = err
				}
			}
		}
		for i, t := range o.Threads {
			for j, c := range all {
				k := i*len(all) + j
				row := Row{Network: w.Network, Threads: t, Contestant: c.Name}
				if failed[k] != nil {
					row.Error = failed[k].Error()
				} else {
					row.fill(runs[k], runs[i*len(all)])
				}
				r.Rows = append(r.Rows, row)
			}
		}
	}
	return r.end(ctx, r.measure(ctx, o, cache))
}

// measure looks at the machine again and keeps the best of all looks: other work on it can only lower the figures.
func (r *Result) measure(ctx context.Context, o Options, cache string) error {
	for i, m := range r.Machines {
		var again Machine
		if err := process(ctx, o.Machine(m.Threads), m.Threads, cache, &again); err != nil {
			return fmt.Errorf("bench: measuring the machine: %w", err)
		}
		r.Machines[i] = m.best(again)
	}
	return nil
}

// end sets the shares.
func (r *Result) end(ctx context.Context, err error) (*Result, error) {
	for i := range r.Rows {
		row := &r.Rows[i]
		if row.Error == "" {
			row.Share = r.work(row.Network).Roofline(r.machine(row.Threads)) / row.Wall
		}
	}
	if ctx.Err() != nil {
		r.Interrupted = true
		return r, ctx.Err()
	}
	return r, err
}

func (r *Result) work(network string) Work {
	for _, w := range r.Work {
		if w.Network == network {
			return w
		}
	}
	return Work{}
}

func (r *Result) machine(threads int) Machine {
	for _, m := range r.Machines {
		if m.Threads == threads {
			return m
		}
	}
	return Machine{}
}

// process runs a command and reads the last line that it prints.
func process(ctx context.Context, args []string, threads int, cache string, into any) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	n := strconv.Itoa(threads)
	cmd.Env = append(os.Environ(), "GOMAXPROCS="+n, "LATHE_THREADS="+n, "OMP_NUM_THREADS="+n, "MKL_NUM_THREADS="+n,
		"TORCHINDUCTOR_CACHE_DIR="+cache, "TRITON_CACHE_DIR="+cache)
	cmd.WaitDelay = 5 * time.Second // for what it started itself and left behind
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && len(exit.Stderr) > 0 {
			s := strings.TrimSpace(string(exit.Stderr))
			err = fmt.Errorf("%w: %s", err, s[max(0, len(s)-1000):])
		}
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), into); err != nil {
		return fmt.Errorf("%s printed no JSON line: %w", args[0], err)
	}
	return nil
}

// fill summarises the runs of one contestant beside those of the first.
func (row *Row) fill(own, first []Step) {
	values := func(f func(i int) float64) []float64 {
		v := make([]float64, len(own))
		for i := range own {
			v[i] = f(i)
		}
		return v
	}
	row.Version = own[0].Version
	row.CPU = stat.Median(values(func(i int) float64 { return own[i].CPU }))
	row.Wall = stat.Median(values(func(i int) float64 { return own[i].Wall }))
	firsts := values(func(i int) float64 { return own[i].First })
	row.First, row.FirstWorst = stat.Median(firsts), slices.Max(firsts)
	row.RSS = slices.Max(values(func(i int) float64 { return float64(own[i].RSS) }))
	ratios := values(func(i int) float64 { return own[i].CPU / first[i].CPU })
	row.Ratio, row.Low, row.High = stat.Median(ratios), slices.Min(ratios), slices.Max(ratios)
}
