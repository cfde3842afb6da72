package norm

import (
	"errors"
	"fmt"
	"strings"

	"github.com/lathe-ml/lathe/nn"
)

// FoldScale multiplies the factors of LayerNormScaling into the gains (and biases) of the norms in front of them and drops
// the factors: the network becomes an ordinary pre-norm one that any engine runs, with the same function. It refuses a
// network without such factors, so one that was folded already, and leaves it as it was.
func FoldScale(net *nn.Network) error {
	type job struct {
		norm, scale *nn.Node
		factor      float32
	}
	var jobs []job
	for _, x := range net.Nodes {
		a, ok := x.Op.(nn.Affine)
		if !ok || a.Shift != 0 || !strings.HasPrefix(lastPart(x.Name), "scale") {
			continue
		}
		n := net.Producer(x.In[0])
		if n == nil {
			continue
		}
		if _, ok := n.Op.(nn.Norm); !ok {
			continue
		}
		readers, isOut := net.Readers(x.In[0])
		switch {
		case len(readers) != 1 || isOut:
			return fmt.Errorf("norm: %q feeds something beside its factor %q", n.Name, x.Name)
		case net.Param(n, "w") == nil:
			return fmt.Errorf("norm: %q has no gain to take the factor of %q", n.Name, x.Name)
		case net.SharedParam(n, "w") || net.Param(n, "b") != nil && net.SharedParam(n, "b"):
			return fmt.Errorf("norm: the gain of %q is shared with another node", n.Name)
		}
		jobs = append(jobs, job{n, x, float32(a.Scale)})
	}
	if len(jobs) == 0 {
		return errors.New("norm: no norm is followed by a factor; the network was not built with LayerNormScaling, or is folded already")
	}
	for _, j := range jobs {
		for _, local := range []string{"w", "b"} {
			p := net.Param(j.norm, local)
			if p == nil {
				continue
			}
			v := p.Data()
			for i := range v {
				v[i] *= j.factor
			}
			if err := p.SetData(v); err != nil {
				return err
			}
		}
		if err := net.Bypass(j.scale.Name); err != nil {
			return err
		}
	}
	return nil
}

func lastPart(name string) string { return name[strings.LastIndexByte(name, '.')+1:] }
