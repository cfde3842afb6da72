package quant

import (
	"maps"
	"slices"

	"github.com/lathe-ml/lathe/nn"
)

// edgeSites are the first and the last sites, which quantisers of few bits keep at more.
func edgeSites(net *nn.Network) map[string]bool {
	edge := firstSites(net)
	maps.Copy(edge, lastSites(net))
	return edge
}

// firstSites are the dense layers and convolutions in front of which there is no other site, on no path: where the
// network's input first meets a weight.
func firstSites(net *nn.Network) map[string]bool {
	behind := map[string]bool{} // values that depend on a site
	first := map[string]bool{}
	for _, n := range net.Nodes {
		passed := slices.ContainsFunc(n.In, func(v string) bool { return behind[v] })
		if _, ok := n.Op.(nn.Linear); ok {
			if isQuantisable(n) && !passed && len(n.In) > 0 {
				first[n.Name] = true
			}
			passed = true
		}
		for _, v := range n.Out {
			behind[v] = passed
		}
	}
	return first
}

// lastSites are the dense layers and convolutions behind which there is no other site, on no path to an output: a
// classifier's last layer, or the last layer on the residual stream.
func lastSites(net *nn.Network) map[string]bool {
	live, ahead := map[string]bool{}, map[string]bool{} // values that an output needs; those that a site still reads
	last := map[string]bool{}
	for _, o := range net.Outputs {
		live[o] = true
	}
	for _, n := range slices.Backward(net.Nodes) {
		if !slices.ContainsFunc(n.Out, func(v string) bool { return live[v] }) {
			continue
		}
		comes := slices.ContainsFunc(n.Out, func(v string) bool { return ahead[v] })
		if _, ok := n.Op.(nn.Linear); ok {
			if isQuantisable(n) && !comes {
				last[n.Name] = true
			}
			comes = true
		}
		for _, v := range n.In {
			live[v] = true
			ahead[v] = ahead[v] || comes
		}
	}
	return last
}
