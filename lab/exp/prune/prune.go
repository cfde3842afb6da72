// Package prune holds the experiments on sparsity.
package prune

import "github.com/lathe-ml/lathe/lab"

// Experiments lists the experiments of the family.
func Experiments() []lab.Experiment {
	return []lab.Experiment{
		LazyNeuron(),
	}
}
