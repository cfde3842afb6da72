package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/lab/bench"
)

func newBenchCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure this machine, training steps, and quantisers on real networks",
		Long: `Measure what this processor can do, what training steps of a fixed set of networks cost on the backends, and what the
quantisers make of real networks.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newBenchTrainCommand(a), newBenchCompressCommand(a), newBenchStepCommand(a), newBenchMachineCommand(a))
	return cmd
}

func newBenchTrainCommand(a *app) *cobra.Command {
	var backends, peers []string
	var output string
	var names []string
	var o bench.Options
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
disturbances; ratios are of processor time, paired by round, and the median is printed with the range. The machine is
measured too, and each step is set against the least time that its products, convolutions and memory traffic need
there (the roofline). The first step is shown apart: it holds the compilation.

With --peer a command that prints the same JSON lines takes part, such as PyTorch by test/peers/bench_torch.py; it may
be given several times, as NAME=COMMAND. Ctrl-C ends the run and prints the networks that are complete.`,
		Example: `  lathe bench train
  lathe bench train vit resnet --rounds 10 --threads 1,2
  lathe bench train --peer "pytorch=python3 test/peers/bench_torch.py" \\
      --peer "compiled=python3 test/peers/bench_torch.py --compile"
  lathe bench train --output performance.json`,
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
			o.Networks = args
			if o.Rounds < 1 || o.Steps < 1 || len(o.Threads) == 0 || slices.Min(o.Threads) < 1 || slices.Max(o.Threads) > 1024 {
				return usageErrorf("--rounds %d --steps %d --threads %v; each must be at least 1, threads at most 1024", o.Rounds, o.Steps, o.Threads)
			}
			if !cmd.Flags().Changed("backends") {
				backends = benchBackends()
			}
			for _, b := range backends {
				if _, err := engine.Choose(b); err != nil {
					return usageErrorf("%v", err)
				}
			}
			return a.benchTrain(cmd.Context(), o, backends, peers, output)
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&backends, "backends", nil, "contestants; the first is what the others are compared with (default native, go, and xla where its plugin is)")
	f.StringArrayVar(&peers, "peer", nil, "another contestant, [NAME=]COMMAND; the command gets --threads N --steps N NETWORK; may be repeated")
	f.StringVarP(&output, "output", "o", "", "write the result as JSON to this file, too")
	f.IntVar(&o.Rounds, "rounds", 3, "rounds; ratios are paired by round")
	f.IntVar(&o.Steps, "steps", 7, "timed steps per round, after two of warm-up")
	f.IntSliceVar(&o.Threads, "threads", []int{1}, "threads of every contestant; several numbers are interleaved, too")
	return cmd
}

// benchBackends are the default contestants.
func benchBackends() (names []string) {
	for _, n := range []string{"native", "go", "xla"} {
		if _, err := engine.Choose(n); err == nil {
			names = append(names, n)
		}
	}
	return names
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
			return a.printLine(s)
		},
	}
	cmd.Flags().IntVar(&steps, "steps", 7, "timed steps")
	return cmd
}

// newBenchMachineCommand measures in a process of its own, so that its memory is nobody else's.
func newBenchMachineCommand(a *app) *cobra.Command {
	var threads int
	cmd := &cobra.Command{
		Use: "machine", Hidden: true, Short: "Measure peak arithmetic and read bandwidth and print a JSON line",
		Example: "  lathe bench machine --threads 2",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			if threads < 1 || threads > 1024 {
				return usageErrorf("--threads %d; accepted: 1 to 1024", threads)
			}
			return a.printLine(bench.MeasureMachine(threads))
		},
	}
	cmd.Flags().IntVar(&threads, "threads", 1, "threads that run at once")
	return cmd
}

func (a *app) printLine(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.stdout, string(line))
	return err
}

func (a *app) benchTrain(ctx context.Context, o bench.Options, backends, peers []string, output string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	o.Machine = func(threads int) []string {
		return []string{self, "bench", "machine", "--threads", strconv.Itoa(threads)}
	}
	var all []bench.Contestant
	for _, b := range backends {
		all = append(all, bench.Contestant{Name: b, Command: func(n string, _, steps int) []string {
			return []string{self, "bench", "step", n, "--backend", b, "--steps", strconv.Itoa(steps)}
		}})
	}
	for i, p := range peers {
		c, err := benchPeer(p, i)
		if err != nil {
			return err
		}
		all = append(all, c)
	}
	for i, c := range all {
		if slices.ContainsFunc(all[:i], func(d bench.Contestant) bool { return d.Name == c.Name }) {
			return usageErrorf("two contestants are called %q; name peers with --peer NAME=COMMAND", c.Name)
		}
	}
	if len(all) == 0 {
		return usageErrorf("name contestants with --backends or --peer")
	}
	bar := a.progress("timing")
	defer bar.Close()
	o.Progress = func(done, total int, what string) {
		bar.Label(what)
		bar.Set(done, total)
	}
	r, err := bench.Compare(ctx, all, o)
	bar.Close()
	if err != nil && (r == nil || !r.Interrupted) {
		return err
	}
	if !r.Interrupted && output != "" {
		if err := r.WriteFile(output); err != nil {
			return err
		}
	}
	if len(r.Rows) > 0 {
		if err := a.emit(r, func(w io.Writer) error { return r.WriteText(w, a.width()) }); err != nil {
			return err
		}
	}
	if r.Interrupted {
		return &interruptedError{errors.New("interrupted; only complete networks are shown, and no file is written")}
	}
	return nil
}

var peerName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]*$`)

// benchPeer reads [NAME=]COMMAND.
func benchPeer(spec string, i int) (bench.Contestant, error) {
	name, command := "peer", spec
	if i > 0 {
		name += strconv.Itoa(i + 1)
	}
	if n, c, ok := strings.Cut(spec, "="); ok && peerName.MatchString(n) {
		name, command = n, c
	}
	fields := strings.Fields(command)
	if len(fields) == 0 {
		return bench.Contestant{}, usageErrorf("--peer %q holds no command; want [NAME=]COMMAND", spec)
	}
	return bench.Contestant{Name: name, Command: func(n string, threads, steps int) []string {
		return append(slices.Clone(fields), "--threads", strconv.Itoa(threads), "--steps", strconv.Itoa(steps), n)
	}}, nil
}
