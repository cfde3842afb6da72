package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/catalog"
	"github.com/lathe-ml/lathe/docs"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/report"
)

// findCard looks a method up; an unknown one is wrong use.
func findCard(id string) (catalog.Card, error) {
	c, err := catalog.Find(id)
	var unknown *catalog.UnknownError
	if errors.As(err, &unknown) {
		return c, usageErrorf("%v", err)
	}
	return c, err
}

func newShowCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "show METHOD",
		Short: "Tell what a method does, how to use it and what was measured",
		Example: `  lathe show soft-nms
  lathe show 67            by its number
  lathe show layernorm --json`,
		Args:              exactArgs("a method"),
		ValidArgsFunction: completeMethods,
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := findCard(args[0])
			if err != nil {
				return err
			}
			results, err := lab.ReadResults(docs.Results())
			if err != nil {
				return err
			}
			r := results[c.ID]
			return a.emit(struct {
				catalog.Card
				URL     string      `json:"url,omitempty"`
				Results *lab.Result `json:"results"`
			}{c, c.URL(), r}, func(w io.Writer) error {
				d := report.Document{Title: fmt.Sprintf("%s  (%s %s)", c.Name, ordinal(c.Number), c.ID), Subtitle: c.Use}
				d.Facts = []report.Fact{
					{Name: "paper", Value: c.Paper},
					{Name: "authors", Value: c.Authors},
					{Name: "venue", Value: strings.TrimSpace(c.Venue + "  " + c.URL())},
					{Name: "family", Value: c.Family},
					{Name: "Go", Value: c.Go},
				}
				if err := d.WriteText(w, a.width()); err != nil {
					return err
				}
				if _, err := fmt.Fprintf(w, "\n%s\n", report.Markdown(w, c.Body, a.width())); err != nil {
					return err
				}
				measured := report.Document{Title: "What was measured", Subtitle: "Nothing yet. Measure it here: lathe try " + c.ID}
				if r != nil {
					full := r.Document()
					measured.Subtitle, measured.Sections = full.Subtitle, full.Sections[:1]
					measured.Facts = []report.Fact{{Name: "on", Value: fmt.Sprintf("%s, %s, %s", r.Date, r.Environment.CPU, r.Environment.Backend)}, {Name: "again", Value: "lathe try " + c.ID}}
				}
				return measured.WriteText(w, a.width())
			})
		},
	}
}
