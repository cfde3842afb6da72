package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/kernel"
	"github.com/lathe-ml/lathe/lab/bench"
	"github.com/lathe-ml/lathe/lab/report"
)

// benchResult is what lathe bench train --json prints.
type benchResult struct {
	CPU       engine.CPU `json:"cpu"`
	Level     string     `json:"level"`          // of the native backend's kernels
	PeakFMA   float64    `json:"peak_fma_flops"` // of one thread, measured
	Bandwidth float64    `json:"read_bandwidth_bytes"`
	Threads   int        `json:"threads"`
	Rounds    int        `json:"rounds"`
	Rows      []benchRow `json:"rows"`
}

// benchRow is one network on one contestant.
type benchRow struct {
	Network    string  `json:"network"`
	Contestant string  `json:"contestant"`
	CPU        float64 `json:"cpu_ms"`   // medians over the rounds
	Wall       float64 `json:"wall_ms"`  //
	First      float64 `json:"first_ms"` //
	RSS        float64 `json:"rss_mb"`
	Speedup    float64 `json:"speedup"` // CPU time of this contestant over the first one's, median of the paired rounds
	Low        float64 `json:"low"`     // smallest and largest of the rounds
	High       float64 `json:"high"`
}

func newBenchCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure this machine and what a training step costs on it",
		Long:  `Measure what this processor can do and what training steps of a fixed set of networks cost on the backends.`,
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newBenchTrainCommand(a), newBenchStepCommand(a))
	return cmd
}

func newBenchTrainCommand(a *app) *cobra.Command {
	var backends []string
	var peer string
	var rounds, steps, threads int
	var names []string
	about := ""
	for _, n := range bench.Networks {
		names = append(names, n.Name)
		about += fmt.Sprintf("  %-8s%s\n", n.Name, n.What)
	}
	cmd := &cobra.Command{
		Use:   "train [NETWORK]...",
		Short: "Time training steps of several networks on several backends, interleaved",
		Long: `Time training steps (forward, backward, AdamW) of these networks:

` + about + `
Every contestant runs in a process of its own, one after another in each round, so that all of them meet the same
disturbances; ratios are of processor time, paired by round, and the median is printed with the range. With --peer a
command that prints the same JSON lines takes part, such as PyTorch by test/peers/bench_torch.py.`,
		Example: `  lathe bench train
  lathe bench train vit resnet --rounds 10 --threads 2
  lathe bench train --peer "python3 test/peers/bench_torch.py"`,
		ValidArgs: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = names
			}
			for _, n := range args {
				if !slices.Contains(names, n) {
					return usageErrorf("there is no network %q; accepted: %s", n, strings.Join(names, ", "))
				}
			}
			if rounds < 1 || steps < 1 || threads < 1 {
				return usageErrorf("--rounds %d --steps %d --threads %d; each must be at least 1", rounds, steps, threads)
			}
			for _, b := range backends {
				if _, err := engine.Choose(b); err != nil {
					return usageErrorf("%v", err)
				}
			}
			return a.benchTrain(cmd.Context(), args, backends, peer, rounds, steps, threads)
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&backends, "backends", []string{"native", "go"}, "contestants; the first is what the others are compared with")
	f.StringVar(&peer, "peer", "", "command of another contestant; gets --threads N --steps N NETWORK")
	f.IntVar(&rounds, "rounds", 3, "rounds; ratios are paired by round")
	f.IntVar(&steps, "steps", 7, "timed steps per round, after two of warm-up")
	f.IntVar(&threads, "threads", 1, "threads of every contestant")
	return cmd
}

// newBenchStepCommand is the inside of bench train: one network in a process of its own.
func newBenchStepCommand(a *app) *cobra.Command {
	var steps int
	cmd := &cobra.Command{
		Use: "step NETWORK", Hidden: true, Short: "Time training steps of one network and print a JSON line",
		Example: "  lathe bench step vit --backend native",
		Args:    exactArgs("network"),
		RunE: func(_ *cobra.Command, args []string) error {
			n, err := bench.Find(args[0])
			if err != nil {
				return usageErrorf("%v", err)
			}
			b, err := a.backend()
			if err != nil {
				return err
			}
			s, err := n.Run(b, steps)
			if err != nil {
				return err
			}
			s.Backend = engine.Name(b)
			line, err := json.Marshal(s)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.stdout, string(line))
			return err
		},
	}
	cmd.Flags().IntVar(&steps, "steps", 7, "timed steps")
	return cmd
}

func (a *app) benchTrain(ctx context.Context, networks, backends []string, peer string, rounds, steps, threads int) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	type contestant struct {
		name    string
		command func(network string) []string
	}
	var all []contestant
	for _, b := range backends {
		all = append(all, contestant{b, func(n string) []string {
			return []string{self, "bench", "step", n, "--backend", b, "--steps", strconv.Itoa(steps)}
		}})
	}
	if fields := strings.Fields(peer); len(fields) > 0 {
		all = append(all, contestant{"peer", func(n string) []string {
			return append(slices.Clone(fields), "--threads", strconv.Itoa(threads), "--steps", strconv.Itoa(steps), n)
		}})
	}
	if len(all) == 0 {
		return usageErrorf("name contestants with --backends")
	}
	level, _ := kernel.Detect()
	r := &benchResult{CPU: engine.ThisCPU(), Level: level.String(), Threads: threads, Rounds: rounds}
	bar := a.progress("timing")
	defer bar.Close()
	done := 0
	for _, n := range networks {
		steps := make([][]bench.Step, len(all))
		for range rounds {
			for i, c := range all {
				s, err := benchProcess(ctx, c.command(n), threads)
				if err != nil {
					return fmt.Errorf("%s on %s: %w", n, c.name, err)
				}
				steps[i] = append(steps[i], s)
				done++
				bar.Set(done, len(networks)*rounds*len(all))
			}
		}
		for i, c := range all {
			r.Rows = append(r.Rows, benchSummary(n, c.name, steps[i], steps[0]))
		}
	}
	bar.Close()
	// Last, because a process counts the memory of the one that started it as its own.
	r.PeakFMA, r.Bandwidth = kernel.PeakFMA(kernel.For(level)), kernel.ReadBandwidth(kernel.For(level), 256<<20)
	return a.emit(r, func(w io.Writer) error {
		t := report.Table{Columns: []string{"network", "on", "CPU ms", "wall ms", "first ms", "MB", "times the first's CPU"}}
		for _, row := range r.Rows {
			t.Rows = append(t.Rows, []string{
				row.Network, row.Contestant, fmt.Sprintf("%.1f", row.CPU), fmt.Sprintf("%.1f", row.Wall), fmt.Sprintf("%.0f", row.First),
				fmt.Sprintf("%.0f", row.RSS), fmt.Sprintf("%.2f (%.2f … %.2f)", row.Speedup, row.Low, row.High),
			})
		}
		t.Note = fmt.Sprintf("%s, %s kernels, %d threads; one thread reaches %.1f GFLOP/s in the first cache and reads %.1f GB/s. Medians of %d rounds; the ratio is paired by round, with its range.",
			r.CPU.Model, r.Level, threads, r.PeakFMA/1e9, r.Bandwidth/1e9, rounds)
		return report.WriteTable(w, t, a.width())
	})
}

// benchProcess runs one contestant and reads the last line that it prints.
func benchProcess(ctx context.Context, args []string, threads int) (s bench.Step, err error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	n := strconv.Itoa(threads)
	cmd.Env = append(os.Environ(), "GOMAXPROCS="+n, "LATHE_THREADS="+n, "OMP_NUM_THREADS="+n)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && len(exit.Stderr) > 0 {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr[:min(len(exit.Stderr), 1000)])))
		}
		return s, err
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &s); err != nil {
		return s, fmt.Errorf("%s printed no JSON line: %w", args[0], err)
	}
	if !(s.CPU > 0) {
		return s, fmt.Errorf("%s measured no processor time", args[0])
	}
	return s, nil
}

func benchSummary(network, name string, own, first []bench.Step) benchRow {
	of := func(f func(bench.Step) float64) float64 {
		v := make([]float64, len(own))
		for i, s := range own {
			v[i] = f(s)
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	ratios := make([]float64, len(own))
	for i := range own {
		ratios[i] = own[i].CPU / first[i].CPU
	}
	slices.Sort(ratios)
	return benchRow{
		Network: network, Contestant: name, Speedup: ratios[len(ratios)/2], Low: ratios[0], High: ratios[len(ratios)-1],
		CPU: of(func(s bench.Step) float64 { return s.CPU }), Wall: of(func(s bench.Step) float64 { return s.Wall }),
		First: of(func(s bench.Step) float64 { return s.First }), RSS: of(func(s bench.Step) float64 { return float64(s.RSS) }),
	}
}
