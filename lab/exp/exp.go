// Package exp is the table of all experiments, by family.
package exp

import (
	"slices"

	"github.com/lathe-ml/lathe/internal/nearest"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/calibrate"
	"github.com/lathe-ml/lathe/lab/exp/curate"
	"github.com/lathe-ml/lathe/lab/exp/detect"
	"github.com/lathe-ml/lathe/lab/exp/norm"
	"github.com/lathe-ml/lathe/lab/exp/optim"
	"github.com/lathe-ml/lathe/lab/exp/prune"
	"github.com/lathe-ml/lathe/lab/exp/quant"
	"github.com/lathe-ml/lathe/lab/exp/restore"
)

// All returns every experiment. A method has one.
func All() []lab.Experiment {
	return slices.Concat(
		calibrate.Experiments(),
		curate.Experiments(),
		detect.Experiments,
		norm.Experiments(),
		optim.Experiments(),
		prune.Experiments(),
		quant.Experiments,
		restore.Experiments,
	)
}

// Find returns the experiment of a method. When there is none, near is the method that was probably meant, or "".
func Find(method string) (e lab.Experiment, near string, ok bool) {
	var ids []string
	for _, e := range All() {
		if e.Method == method {
			return e, "", true
		}
		ids = append(ids, e.Method)
	}
	near, _ = nearest.Match(method, ids)
	return lab.Experiment{}, near, false
}
