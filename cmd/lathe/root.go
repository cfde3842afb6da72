package main

import (
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/lathe-ml/lathe/internal/nearest"
)

// Groups of verbs in the help.
const (
	groupUse     = "use"
	groupMeasure = "measure"
	groupModels  = "models"
	groupAbout   = "about"
)

// verbs is the table of all verbs, one file each, in the order of the help.
var verbs = []struct {
	group string
	new   func(a *app) *cobra.Command
}{
	{groupUse, newCurateCommand},
	{groupUse, newCompressCommand},
	{groupUse, newConvertCommand},
	{groupUse, newCalibrateCommand},
	{groupUse, newSparsityCommand},
	{groupUse, newDeployTrainCommand},
	{groupUse, newNMSCommand},
	{groupUse, newUpscaleCommand},

	{groupMeasure, newMethodsCommand},
	{groupMeasure, newShowCommand},
	{groupMeasure, newTryCommand},
	{groupMeasure, newRunsCommand},
	{groupMeasure, newNormsCommand},

	{groupModels, newInspectCommand},
	{groupModels, newDiffCommand},
	{groupModels, newTrainCommand},
	{groupModels, newEvalCommand},
	{groupModels, newDataCommand},

	{groupMeasure, newDemoCommand},

	{groupAbout, newDoctorCommand},
	{groupAbout, newBenchCommand},
	{groupAbout, newVersionCommand},
	{"", newDocsCommand},
}

func newRootCommand(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "lathe",
		Short: "Turn published techniques on your own network, and measure what they do",
		Long: `Lathe takes a neural network through its life - choose the data, train it, make it smaller, run it - with
the techniques of published papers. Each can be used on your own model or data, and each can be tried beside
its baselines to see which of the paper's claims hold.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted (finished work is saved; the same command goes on).`,
		Example: `  lathe methods                              what there is
  lathe show repq-vit                        what a method does and how to use it
  lathe try repq-vit --scale smoke           run it beside its baselines, quickly
  lathe doctor                               what computes here, and how to make it faster`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownVerb(cmd, args[0])
			}
			return cmd.Help()
		},
	}
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if !cmd.HasParent() { // a flag of an unknown verb: the verb is what is wrong
			for _, arg := range a.args {
				if !strings.HasPrefix(arg, "-") {
					return unknownVerb(cmd, arg)
				}
			}
		}
		return flagError(cmd, err)
	})
	f := root.PersistentFlags()
	f.BoolVar(&a.json, "json", false, "print the result as JSON")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "no progress and no remarks, only the result")
	f.StringVar(&a.backendName, "backend", "", "what computes: native, xla or go (default: the best that is here; see lathe doctor)")

	root.AddGroup(
		&cobra.Group{ID: groupUse, Title: "Use a method on your own files:"},
		&cobra.Group{ID: groupMeasure, Title: "Look at methods and measure them:"},
		&cobra.Group{ID: groupModels, Title: "Models and data:"},
		&cobra.Group{ID: groupAbout, Title: "About this installation:"},
	)
	root.SetHelpCommandGroupID(groupAbout)
	root.SetCompletionCommandGroupID(groupAbout)
	for _, v := range verbs {
		cmd := v.new(a)
		cmd.GroupID = v.group
		a.markRunning(cmd)
		root.AddCommand(cmd)
	}
	return root
}

// markRunning makes a.running true once cmd or a subcommand has been found, with its flags and arguments in order.
func (a *app) markRunning(cmd *cobra.Command) {
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			a.running = true
			return run(cmd, args)
		}
	}
	for _, c := range cmd.Commands() {
		a.markRunning(c)
	}
}

// unknownVerb is the error for a subcommand that cmd does not have.
func unknownVerb(cmd *cobra.Command, name string) error {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	if near, ok := nearest.Match(name, names); ok {
		return usageErrorf("there is no command %q; did you mean %q?", cmd.CommandPath()+" "+name, cmd.CommandPath()+" "+near)
	}
	return usageErrorf("there is no command %q; \"%s --help\" lists what there is", cmd.CommandPath()+" "+name, cmd.CommandPath())
}

// flagError adds the near flag to pflag's error about an unknown one, and says where the flags are listed.
func flagError(cmd *cobra.Command, err error) error {
	message := err.Error()
	if name, ok := strings.CutPrefix(message, "unknown flag: --"); ok {
		var names []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden {
				names = append(names, f.Name)
			}
		})
		if near, ok := nearest.Match(name, names); ok {
			return usageErrorf("%q has no flag --%s; did you mean --%s?", cmd.CommandPath(), name, near)
		}
	}
	return usageErrorf("%s; \"%s --help\" lists the flags", message, cmd.CommandPath())
}
