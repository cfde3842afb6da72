package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/lab/store"
)

type tryFlags struct {
	scale   string
	seeds   int
	fresh   bool
	anyCode bool
	report  string
	results string
}

func newTryCommand(a *app) *cobra.Command {
	var f tryFlags
	cmd := &cobra.Command{
		Use:   "try METHOD...",
		Short: "Run a method beside its baselines and judge the claims of its paper",
		Long: `Run every arm of a method's experiment (baselines, the method, ablations) on the same data and seeds, and say
which of the paper's claims hold here, by how much and how surely. A claim that fails is printed as failing; it
does not make the command fail.

Every arm of every seed is stored when it is finished, so a run that was stopped or killed goes on where it was
when the command is given again. Results that another build measured are measured anew unless --reuse is given.
Two builds are the same when they are of one commit without changes, or the same program file.

Runs are kept in $LATHE_HOME (default: $XDG_DATA_HOME/lathe, ~/.local/share/lathe); "lathe runs" lists them.`,
		Example: `  lathe try soft-nms                                  full scale, three seeds
  lathe try repq-vit --scale smoke                    seconds, to see that it runs
  lathe try layernorm espcn --report report.html      two methods, one page
  lathe try data-pruning --results docs/results       keep the verdicts in a work tree`,
		Args:              someArgs("method"),
		ValidArgsFunction: completeMethods,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.try(cmd.Context(), args, f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.scale, "scale", "full", "smoke (seconds; nothing is judged) or full (minutes)")
	fl.IntVar(&f.seeds, "seeds", 0, "how many seeds: 0, 1, ... (default: 3 at full scale, 1 at smoke scale)")
	fl.BoolVar(&f.fresh, "fresh", false, "measure again what is stored already")
	fl.BoolVar(&f.anyCode, "reuse", false, "take stored results that another build of lathe measured")
	fl.StringVar(&f.report, "report", "", `write the report to this HTML file (default: in the store; the path is printed; "none": no report)`)
	fl.StringVar(&f.results, "results", "", "write METHOD.json with the verdicts into this folder (full scale, at least 3 seeds)")
	_ = cmd.RegisterFlagCompletionFunc("scale", oneOf("smoke", "full"))
	return cmd
}

// findExperiment looks the experiment of a method up by anything that names the method.
func findExperiment(name string) (lab.Experiment, error) {
	e, near, ok := exp.Find(name)
	if ok {
		return e, nil
	}
	c, err := findCard(name)
	if err != nil {
		if near != "" {
			return e, usageErrorf("there is no method %q; did you mean %q?", name, near)
		}
		return e, err
	}
	if e, _, ok = exp.Find(c.ID); !ok {
		return e, fmt.Errorf("method %q has no experiment in this build", c.ID)
	}
	return e, nil
}

func (a *app) try(ctx context.Context, names []string, f tryFlags) error {
	scale, err := lab.ParseScale(f.scale)
	if err != nil {
		return usageErrorf("--scale: %v", err)
	}
	if f.seeds < 0 || f.seeds > 1000 {
		return usageErrorf("--seeds %d: must be 1 to 1000 (or 0 for the default)", f.seeds)
	}
	if f.fresh && f.anyCode {
		return usageErrorf("--fresh and --reuse exclude each other")
	}
	if n := len(lab.DefaultSeeds(scale, f.seeds)); f.results != "" && (scale != lab.Full || n < lab.MinSeeds) {
		return usageErrorf("--results keeps only full runs of at least %d seeds; this is %s with %d", lab.MinSeeds, scale, n)
	}
	var experiments []lab.Experiment
	for _, name := range names {
		e, err := a.find(name)
		if err != nil {
			return err
		}
		experiments = append(experiments, e)
	}
	backend, err := a.backend()
	if err != nil {
		return err
	}
	s, err := a.openStore()
	if err != nil {
		return err
	}
	defer s.Close()

	var results []*lab.Result
	var failed []error
	for _, e := range experiments {
		r, err := a.tryOne(ctx, e, lab.Options{
			Scale: scale, Seeds: lab.DefaultSeeds(scale, f.seeds), Backend: backend, Store: s, Fresh: f.fresh, AnyCode: f.anyCode,
			Networks: filepath.Join(data.Dir(), "networks"), Command: append([]string{"lathe"}, a.args...),
		})
		if ctx.Err() != nil {
			return err
		}
		if err != nil {
			failed = append(failed, err)
		}
		if r == nil {
			continue
		}
		results = append(results, r)
		if f.results != "" && err == nil {
			path, err := r.Save(f.results)
			if err != nil {
				return err
			}
			a.note("verdicts: %s", path)
		}
		if !a.json {
			if len(results) > 1 {
				fmt.Fprintln(a.stdout)
			}
			if err := r.Document().WriteText(a.stdout, a.width()); err != nil {
				return err
			}
		}
	}
	if len(results) > 0 && f.report != "none" {
		path, err := a.saveReport(ctx, s, lab.Documents(results), results, f.report)
		if err != nil {
			return err
		}
		a.note("report: %s", path)
	}
	if a.json {
		if err := a.printJSON(results); err != nil {
			return err
		}
	}
	return errors.Join(failed...)
}

// tryOne runs one experiment with a progress bar.
func (a *app) tryOne(ctx context.Context, e lab.Experiment, o lab.Options) (*lab.Result, error) {
	bar := a.progress(e.Method)
	defer bar.Close()
	o.Observe = func(ev lab.Event) {
		label := fmt.Sprintf("%s %d/%d  %s, seed %d", ev.Method, ev.Index+1, ev.Units, ev.Arm, ev.Seed)
		switch ev.Kind {
		case lab.UnitStarted:
			bar.Label(label)
			bar.Set(0, 100)
		case lab.UnitProgress:
			bar.Label(label)
			bar.Set(ev.Done, ev.Total)
		case lab.UnitSkipped:
			bar.Println(label + ": stored already")
		case lab.UnitDone:
			bar.Println(label + ": done")
		case lab.UnitLog:
			a.say(bar, label+": "+ev.Message)
		case lab.UnitFailed:
			a.say(bar, label+": failed: "+ev.Message)
		}
	}
	return lab.Run(ctx, e, o)
}

// say prints a line above the bar, or as a note where there is no bar.
func (a *app) say(bar *progressBar, line string) {
	if bar == nil {
		a.note("%s", line)
		return
	}
	bar.Println(line)
}

// saveReport writes the report to path (or into the store) and keeps it as an artefact of each run.
func (a *app) saveReport(ctx context.Context, s *store.Store, d *report.Document, results []*lab.Result, path string) (string, error) {
	var b bytes.Buffer
	if err := d.WriteHTML(&b); err != nil {
		return "", err
	}
	for _, r := range results {
		if err := s.AddArtefact(ctx, r.Run, store.Blob{Name: "report.html", Media: "text/html", Content: b.Bytes()}); err != nil {
			return "", err
		}
	}
	if path == "" {
		dir := filepath.Join(s.Dir(), "reports")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
		name := "several"
		if len(results) == 1 {
			name = results[0].Method
		}
		path = filepath.Join(dir, name+"-"+results[0].Scale.String()+".html")
	}
	if err := atomicfile.Write(path, func(w io.Writer) error { _, err := w.Write(b.Bytes()); return err }); err != nil {
		return "", fmt.Errorf("write report: %w", err)
	}
	return path, nil
}
