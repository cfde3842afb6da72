package detect_test

import (
	"fmt"

	"github.com/lathe-ml/lathe/task/detect"
)

func ExampleSoftNMS() {
	boxes := [][4]float32{{0, 0, 10, 10}, {0, 0, 10, 10}, {0, 0, 10, 5}}
	scores := []float32{0.9, 0.8, 0.7}
	keep, rescored, err := detect.SoftNMS(boxes, scores, detect.SoftNMSConfig{})
	if err != nil {
		fmt.Println(err)
		return
	}
	for i, k := range keep {
		fmt.Printf("box %d: %.3f, was %.1f\n", k, rescored[i], scores[k])
	}
	// Output:
	// box 0: 0.900, was 0.9
	// box 2: 0.425, was 0.7
	// box 1: 0.066, was 0.8
}
