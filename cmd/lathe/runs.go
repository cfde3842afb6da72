package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/lab/store"
)

func newRunsCommand(a *app) *cobra.Command {
	var method, reportPath string
	var limit int
	cmd := &cobra.Command{
		Use:   "runs [ID]",
		Short: "List the stored runs, or show one",
		Long: `List what was run on this machine, the newest first, or show one run with all that it measured. Runs are kept
in $LATHE_HOME (default: $XDG_DATA_HOME/lathe, ~/.local/share/lathe) in one SQLite database, with pictures and
reports in files beside it.`,
		Example: `  lathe runs
  lathe runs --method soft-nms --limit 5
  lathe runs 12
  lathe runs 12 --report report.html       write its report again
  lathe runs rm 12 13
  lathe runs check                         is the store whole?`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				if _, err := strconv.ParseInt(args[0], 10, 64); err != nil {
					return unknownVerb(cmd, args[0])
				}
			}
			if len(args) > 1 {
				return usageErrorf("\"lathe runs\" shows one run at a time, got %d", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.openStore()
			if err != nil {
				return err
			}
			defer s.Close()
			if len(args) == 1 {
				id, _ := strconv.ParseInt(args[0], 10, 64) // checked by Args
				return a.showRun(cmd, s, id, reportPath)
			}
			if reportPath != "" {
				return usageErrorf("--report needs the ID of a run")
			}
			if limit < 0 {
				return usageErrorf("--limit %d: must not be negative", limit)
			}
			runs, err := s.Runs(cmd.Context(), method, limit)
			if err != nil {
				return err
			}
			return a.emit(runs, func(w io.Writer) error {
				if len(runs) == 0 {
					_, err := fmt.Fprintf(w, "no runs in %s\n", s.Dir())
					return err
				}
				t := report.Table{Columns: []string{"id", "started", "verb", "method", "scale", "seeds", "status", "seconds", "result"}}
				for _, r := range runs {
					seconds := ""
					if !r.Ended.IsZero() {
						seconds = fmt.Sprintf("%.1f", r.Ended.Sub(r.Started).Seconds())
					}
					seeds := ""
					if len(r.Seeds) > 0 {
						seeds = fmt.Sprint(len(r.Seeds))
					}
					t.Rows = append(t.Rows, []string{fmt.Sprint(r.ID), r.Started.Local().Format("2006-01-02 15:04"), r.Kind, r.Method, r.Scale, seeds, r.Status, seconds, conclusion(r)})
				}
				return report.WriteTable(w, t, a.width())
			})
		},
	}
	cmd.Flags().StringVar(&method, "method", "", "only runs of this method")
	cmd.Flags().IntVar(&limit, "limit", 30, "at most so many, the newest (0: all)")
	cmd.Flags().StringVar(&reportPath, "report", "", "write the report of the run with ID to this HTML file")
	_ = cmd.RegisterFlagCompletionFunc("method", completeMethods)
	cmd.AddCommand(newRunsRemoveCommand(a), newRunsCheckCommand(a))
	return cmd
}

// conclusion says in a few words what a run came to.
func conclusion(r store.Run) string {
	if r.Status != store.Done {
		line, _, _ := strings.Cut(r.Error, "\n")
		return line
	}
	if r.Kind != "try" {
		return ""
	}
	result, err := lab.ParseResult(r.Result)
	if err != nil {
		return ""
	}
	return result.Summary()
}

func (a *app) showRun(cmd *cobra.Command, s *store.Store, id int64, reportPath string) error {
	ctx := cmd.Context()
	r, err := s.Run(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("there is no run %d; \"lathe runs\" lists them", id)
	}
	if err != nil {
		return err
	}
	units, err := s.Units(ctx, id)
	if err != nil {
		return err
	}
	artefacts, err := s.RunArtefacts(ctx, id)
	if err != nil {
		return err
	}
	for _, u := range units {
		more, err := s.UnitArtefacts(ctx, u.ID)
		if err != nil {
			return err
		}
		artefacts = append(artefacts, more...)
	}
	var result *lab.Result
	if r.Kind == "try" && r.Result != nil {
		if result, err = lab.Load(ctx, s, id); err != nil {
			return err
		}
	}
	if reportPath != "" {
		if result == nil {
			return fmt.Errorf("run %d (%s) has no report to write", id, r.Kind)
		}
		if err := result.Document().Save(reportPath); err != nil {
			return err
		}
	}
	type unitJSON struct {
		store.Unit
		Metrics map[string]*float64     `json:"metrics"`
		Series  map[string][][2]float64 `json:"series,omitempty"`
	}
	out := struct {
		store.Run
		Units     []unitJSON       `json:"units"`
		Artefacts []store.Artefact `json:"artefacts"`
	}{r, []unitJSON{}, append([]store.Artefact{}, artefacts...)}
	for _, u := range units {
		j := unitJSON{Unit: u, Metrics: map[string]*float64{}, Series: map[string][][2]float64{}}
		for _, m := range u.Metrics {
			if m.Value == m.Value { // not NaN
				j.Metrics[m.Name] = &m.Value
			} else {
				j.Metrics[m.Name] = nil
			}
		}
		for _, p := range u.Series {
			j.Series[p.Name] = append(j.Series[p.Name], [2]float64{p.X, p.Y})
		}
		out.Units = append(out.Units, j)
	}
	return a.emit(out, func(w io.Writer) error {
		d := &report.Document{Title: fmt.Sprintf("Run %d: %s %s", r.ID, r.Kind, r.Method)}
		if result != nil {
			d = result.Document()
			d.Title = fmt.Sprintf("Run %d: %s", r.ID, d.Title)
		}
		d.Facts = append([]report.Fact{
			{Name: "Status", Value: strings.TrimSpace(r.Status + "  " + r.Error)},
			{Name: "Started", Value: r.Started.Local().Format(time.RFC1123)},
			{Name: "Units", Value: fmt.Sprintf("%d finished", len(units))},
		}, d.Facts...)
		if result == nil {
			d.Facts = append(d.Facts, report.Fact{Name: "Command", Value: strings.Join(r.Command, " ")}, report.Fact{Name: "Config", Value: string(r.Config)})
			if r.Result != nil {
				var b strings.Builder
				e := json.NewEncoder(&b)
				e.SetIndent("", "  ")
				if err := e.Encode(r.Result); err == nil {
					d.Add(report.Text{Title: "Result", Paragraphs: []string{b.String()}})
				}
			}
		}
		if len(artefacts) > 0 {
			t := report.Table{Title: "Artefacts", Columns: []string{"name", "type", "size", "sha256"}}
			for _, x := range artefacts {
				t.Rows = append(t.Rows, []string{x.Name, x.Media, report.Bytes(x.Bytes), x.SHA256[:12]})
			}
			d.Add(t)
		}
		return d.WriteText(w, a.width())
	})
}

func newRunsRemoveCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "rm ID...",
		Short:   "Remove runs, with what only they measured",
		Example: "  lathe runs rm 3 4",
		Args:    someArgs("run ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var ids []int64
			for _, arg := range args {
				id, err := strconv.ParseInt(arg, 10, 64)
				if err != nil {
					return usageErrorf("%q is no run ID; \"lathe runs\" lists them", arg)
				}
				ids = append(ids, id)
			}
			s, err := a.openStore()
			if err != nil {
				return err
			}
			defer s.Close()
			for _, id := range ids {
				if err := s.Remove(cmd.Context(), id); errors.Is(err, store.ErrNotFound) {
					return fmt.Errorf("there is no run %d; \"lathe runs\" lists them", id)
				} else if err != nil {
					return err
				}
			}
			return a.emit(map[string]any{"removed": ids}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "removed %d of %d\n", len(ids), len(ids))
				return err
			})
		},
	}
}

func newRunsCheckCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Check that the store is whole",
		Long:  "Check the database with SQLite's integrity check, and every artefact against its hash.",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.openStore()
			if err != nil {
				return err
			}
			defer s.Close()
			if err := s.Check(cmd.Context()); err != nil {
				return err
			}
			return a.emit(map[string]any{"store": s.Dir(), "ok": true}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%s is whole\n", s.Dir())
				return err
			})
		},
	}
}
