package learn

import (
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
)

// CrossEntropy is the mean of −log softmax(logits)[label] over logits [..., classes] and integer labels [...].
func CrossEntropy(logits, labels *graph.Node) *graph.Node {
	return SoftCrossEntropy(logits, graph.OneHot(labels, logits.Shape().Dimensions[logits.Rank()-1], logits.DType()))
}

// SoftCrossEntropy is the mean of −Σ target·log softmax(logits); targets are distributions shaped like the logits and
// carry no gradient.
func SoftCrossEntropy(logits, target *graph.Node) *graph.Node {
	return graph.ReduceAllMean(graph.Neg(graph.ReduceSum(graph.Mul(nn.LogSoftmaxOf(logits, -1), graph.StopGradient(target)), -1)))
}

// SmoothTargets turns integer labels [...] into distributions with 1−ε on the label and ε spread over all classes.
func SmoothTargets(labels *graph.Node, classes int, epsilon float64, dtype dtypes.DType) *graph.Node {
	return graph.AddScalar(graph.MulScalar(graph.OneHot(labels, classes, dtype), 1-epsilon), epsilon/float64(classes))
}

// Accuracy is the share of cases whose largest logit, the first of equals, is the label's.
func Accuracy(logits, labels *graph.Node) *graph.Node {
	hit := graph.Equal(graph.ArgMax(logits, -1, dtypes.Int32), graph.ConvertDType(labels, dtypes.Int32))
	return graph.ReduceAllMean(graph.ConvertDType(hit, dtypes.Float32))
}

// MSE is the mean squared difference over all elements.
func MSE(a, b *graph.Node) *graph.Node {
	d := graph.Sub(a, b)
	return graph.ReduceAllMean(graph.Mul(d, d))
}

// LanguageModel is the loss of a network from tokens to logits of the next one: cross-entropy, in nats per token, on batches
// (tokens, next tokens).
func LanguageModel(n *nn.Network) LossFunc {
	return func(env *nn.Env, batch []*graph.Node) *graph.Node {
		return CrossEntropy(n.Lower(env, map[string]*graph.Node{n.Inputs[0].Name: batch[0]})[0], batch[1])
	}
}

// Classifier is the loss of a network of one input and one output of logits: cross-entropy on batches (inputs, integer
// labels), with "accuracy" reported.
func Classifier(n *nn.Network) LossFunc {
	return func(env *nn.Env, batch []*graph.Node) *graph.Node {
		logits := n.Lower(env, map[string]*graph.Node{n.Inputs[0].Name: batch[0]})[0]
		Report(env, "accuracy", Accuracy(logits, batch[1]))
		return CrossEntropy(logits, batch[1])
	}
}
