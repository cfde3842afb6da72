package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/catalog"
	"github.com/lathe-ml/lathe/docs"
	"github.com/lathe-ml/lathe/internal/nearest"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/report"
)

// methodSummary is one line of the list of methods.
type methodSummary struct {
	ID      string `json:"id"`
	Number  int    `json:"number"`
	Name    string `json:"name"`
	Family  string `json:"family"`
	Paper   string `json:"paper"`
	Venue   string `json:"venue"`
	Use     string `json:"use"`
	Claims  int    `json:"claims"` // judged in docs/results
	Holds   int    `json:"holds"`
	Fails   int    `json:"fails"`
	Results string `json:"results"` // in words; "not measured yet" without results
}

func newMethodsCommand(a *app) *cobra.Command {
	var family string
	cmd := &cobra.Command{
		Use:   "methods",
		Short: "List the methods, with what was measured of their claims",
		Long: `List every method: its id (what the other commands call it), its number, its family, its paper, and how the
claims of the paper fared when it was measured at full scale.`,
		Example: `  lathe methods
  lathe methods --family quantisation
  lathe methods --json`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			cards, err := catalog.All()
			if err != nil {
				return err
			}
			results, err := lab.ReadResults(docs.Results())
			if err != nil {
				return err
			}
			if family != "" {
				var families []string
				for _, c := range cards {
					if !slices.Contains(families, c.Family) {
						families = append(families, c.Family)
					}
				}
				if !slices.Contains(families, family) {
					if near, ok := nearest.Match(family, families); ok {
						return usageErrorf("there is no family %q; did you mean %q?", family, near)
					}
					return usageErrorf("there is no family %q; there are %s", family, strings.Join(families, ", "))
				}
			}
			list := []methodSummary{}
			for _, c := range cards {
				if family != "" && c.Family != family {
					continue
				}
				m := methodSummary{ID: c.ID, Number: c.Number, Name: c.Name, Family: c.Family, Paper: c.Paper, Venue: c.Venue, Use: c.Use, Results: "not measured yet"}
				if r := results[c.ID]; r != nil {
					m.Claims, m.Holds, m.Fails, m.Results = len(r.Verdicts), r.Count(lab.Holds), r.Count(lab.Fails), r.Summary()
				}
				list = append(list, m)
			}
			return a.emit(list, func(w io.Writer) error {
				t := report.Table{Columns: []string{"id", "no", "name", "family", "claims", "paper"}, Note: "\"lathe show ID\" tells more; \"lathe try ID\" measures it here."}
				for _, m := range list {
					t.Rows = append(t.Rows, []string{m.ID, ordinal(m.Number), m.Name, m.Family, m.Results, m.Paper + " (" + m.Venue + ")"})
				}
				return report.WriteTable(w, t, a.width())
			})
		},
	}
	cmd.Flags().StringVar(&family, "family", "", "only the methods of this family")
	return cmd
}

// ordinal prints the number of a method; plain baselines have none.
func ordinal(n int) string {
	if n == 0 {
		return "–"
	}
	return fmt.Sprintf("%02d", n)
}

// noArgs refuses arguments.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageErrorf("%q takes no arguments, got %q", cmd.CommandPath(), args[0])
	}
	return nil
}

// exactArgs wants these arguments, named for the message.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usageErrorf("%q needs %s; see \"%s --help\"", cmd.CommandPath(), strings.Join(names, " and "), cmd.CommandPath())
		}
		if len(args) > len(names) {
			return usageErrorf("%q takes only %s, got %q too", cmd.CommandPath(), strings.Join(names, " and "), args[len(names)])
		}
		return nil
	}
}

// someArgs wants at least one argument.
func someArgs(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageErrorf("%q needs at least one %s; see \"%s --help\"", cmd.CommandPath(), name, cmd.CommandPath())
		}
		return nil
	}
}

// completeMethods offers the ids of the methods to the shell.
func completeMethods(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	cards, err := catalog.All()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	ids := make([]string, len(cards))
	for i, c := range cards {
		ids[i] = c.ID + "\t" + c.Use
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}

// oneOf offers fixed values of a flag to the shell.
func oneOf(values ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
}
