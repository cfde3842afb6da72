package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/lab/pages"
)

func newDocsCommand(a *app) *cobra.Command {
	var check bool
	cmd := &cobra.Command{
		Use:    "docs [DIR]",
		Hidden: true,
		Short:  "Generate docs/methods and the table of the README from docs/results",
		Long: `Generate the pages in docs/methods, and the table between the marks in README.md, of the work tree DIR (default:
the current folder) from docs/results and the catalogue in this program.`,
		Example: "  lathe docs\n  lathe docs --check",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			root := "."
			if len(args) > 0 {
				root = args[0]
			}
			changed, err := pages.Write(root, check)
			if err != nil {
				return err
			}
			if check && len(changed) > 0 {
				return fmt.Errorf("not up to date: %s; run \"lathe docs\"", strings.Join(changed, ", "))
			}
			return a.emit(map[string]any{"changed": append([]string{}, changed...)}, func(w io.Writer) error {
				for _, c := range changed {
					if _, err := fmt.Fprintln(w, c); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&check, "check", false, "change nothing; fail when a file is not up to date")
	return cmd
}
