package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/lab/quanttable"
)

type benchCompressFlags struct {
	methods      []string
	bits         []int
	peer         string
	output, work string
	timeout      time.Duration
}

func newBenchCompressCommand(a *app) *cobra.Command {
	var f benchCompressFlags
	var names []string
	about := ""
	for _, n := range quanttable.Networks {
		names = append(names, n.Name)
		about += fmt.Sprintf("  %-19s%s: %s\n", n.Name, n.Title, n.Measure)
	}
	cmd := &cobra.Command{
		Use:   "compress [NETWORK]...",
		Short: "Compress real networks by every quantiser at every width, and judge the results",
		Long: `Compress real networks by every method of "lathe compress" at every number of bits, each in a process of its own,
and measure quality on held-out cases, bytes, seconds and peak memory:

` + about + `
With --peer a command takes part that quantises the same files on the same examples, such as ONNX Runtime by
test/peers/quantize_ort.py; it also runs every file that Lathe exports and must compute what Lathe computes.

Finished cells are kept in --work, so that Ctrl-C costs one cell. With -o the table is written as JSON; networks that
the file holds already and that are not measured this time stay. "lathe docs" makes docs/guides/quantisers.md of it.`,
		Example: `  lathe bench compress doc-orientation --methods minmax --bits 8,4
  lathe bench compress --peer "python3 test/peers/quantize_ort.py" -o docs/guides/quantisers.json`,
		ValidArgs: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = names
			}
			var networks []quanttable.Network
			for _, name := range args {
				n, err := quanttable.Find(name)
				if err != nil {
					return usageErrorf("%v", err)
				}
				networks = append(networks, n)
			}
			return a.benchCompress(cmd.Context(), networks, f)
		},
	}
	fl := cmd.Flags()
	fl.StringSliceVar(&f.methods, "methods", nil, "quantisers (default: all of lathe compress)")
	fl.IntSliceVar(&f.bits, "bits", []int{8, 6, 4, 3, 2}, "bits of a weight; activations have 8, at 4 bits also none")
	fl.StringVar(&f.peer, "peer", "", "command that quantises the same networks, see above")
	fl.StringVarP(&f.output, "output", "o", "", "write the table as JSON to this file, too")
	fl.StringVar(&f.work, "work", "", "folder of prepared networks and finished cells (default: below the data)")
	fl.DurationVar(&f.timeout, "timeout", 10*time.Minute, "longest time of one cell")
	_ = cmd.RegisterFlagCompletionFunc("methods", oneOf(compressorNames()...))
	return cmd
}

// contestants are the cells of the methods and widths that were asked for.
func (f benchCompressFlags) contestants() ([]quanttable.Contestant, error) {
	methods := f.methods
	if len(methods) == 0 {
		methods = compressorNames()
	}
	var out []quanttable.Contestant
	for _, name := range methods {
		m, err := findCompressor(name)
		if err != nil {
			return nil, usageErrorf("%v", err)
		}
		least, most := 2, 8
		if m.bits != [2]int{} {
			least, most = m.bits[0], m.bits[1]
		}
		acts := []int{8, 32}
		if m.weightOnly {
			acts = []int{32}
		}
		for _, act := range acts {
			for _, bits := range f.bits {
				if bits < 2 || bits > 8 {
					return nil, usageErrorf("--bits %d; accepted: 2 to 8", bits)
				}
				if bits < least || bits > most || act == 32 && bits != 4 && !m.weightOnly {
					continue
				}
				out = append(out, quanttable.Contestant{Tool: "lathe", Method: name, Bits: bits, ActBits: act})
				if act == 32 && bits == 4 && !m.weightOnly {
					out = append(out, quanttable.Contestant{Tool: "lathe", Method: name, Bits: bits, ActBits: act, Flags: quanttable.DenseOnly})
				}
			}
		}
	}
	if len(out) == 0 {
		return nil, usageErrorf("none of %s serves %v bits", strings.Join(methods, ", "), f.bits)
	}
	return out, nil
}

func (a *app) benchCompress(ctx context.Context, networks []quanttable.Network, f benchCompressFlags) error {
	contestants, err := f.contestants()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	b, err := a.backend()
	if err != nil {
		return err
	}
	if f.work == "" {
		f.work = filepath.Join(data.Dir(), "quantisers")
	}
	bar := a.progress("compressing")
	defer bar.Close()
	t, err := quanttable.Run(ctx, b, networks, quanttable.Options{
		Lathe: self, Peer: strings.Fields(f.peer), Work: f.work, References: filepath.Join(data.Dir(), "networks"), Contestants: contestants,
		CPU: engine.ThisCPU().Model, Backend: engine.Name(b), Timeout: f.timeout,
		Progress: func(label string, done, total int) {
			bar.Label(label)
			bar.Set(done, total)
		},
	})
	bar.Close()
	if err != nil {
		return err
	}
	if f.output != "" {
		all := &quanttable.Table{}
		if old, err := quanttable.Read(f.output); err == nil {
			all = old
		} else if _, exists := os.Stat(f.output); exists == nil {
			return err
		}
		all.Merge(t)
		if err := atomicfile.Write(f.output, func(w io.Writer) error {
			e := json.NewEncoder(w)
			e.SetIndent("", " ")
			return e.Encode(all)
		}); err != nil {
			return err
		}
	}
	return a.emit(t, func(w io.Writer) error { return t.Document().WriteText(w, a.width()) })
}
