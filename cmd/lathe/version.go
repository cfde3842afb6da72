package main

import (
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/lab"
)

func newVersionCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print which lathe this is",
		Example: "  lathe version --json",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				lab.Build
				Go   string `json:"go"`
				OS   string `json:"os"`
				Arch string `json:"arch"`
			}{lab.ThisBuild(), runtime.Version(), runtime.GOOS, runtime.GOARCH}
			return a.emit(v, func(w io.Writer) error {
				commit := ""
				if v.Commit != "" {
					commit = " " + v.Commit[:min(12, len(v.Commit))]
					if v.Modified {
						commit += "+changes"
					}
				}
				_, err := fmt.Fprintf(w, "lathe %s%s, %s %s/%s\n", v.Version, commit, v.Go, v.OS, v.Arch)
				return err
			})
		},
	}
}
