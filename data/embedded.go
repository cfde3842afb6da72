package data

import (
	"bytes"
	"embed"
	"fmt"
)

//go:generate go run ./internal/embed

//go:embed embedded/*.gz
var embedded embed.FS

// EmbeddedFashionMNIST returns the slice of Fashion-MNIST that is part of the program, so that a first run needs no
// download: the first 2,000 test pictures, and the first 64 training pictures for calibration. (MIT licence, Zalando
// SE; see embedded/LICENSE.)
func EmbeddedFashionMNIST() (test, calib *Images, err error) {
	if test, err = embeddedImages("t10k"); err != nil {
		return nil, nil, err
	}
	if calib, err = embeddedImages("train"); err != nil {
		return nil, nil, err
	}
	return test, calib, nil
}

func embeddedImages(part string) (*Images, error) {
	var x [2]*IDX
	for i, kind := range []string{"images", "labels"} {
		name := fmt.Sprintf("embedded/%s-%s.idx.gz", part, kind)
		b, err := embedded.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("data: %w", err)
		}
		if x[i], err = ReadIDX(bytes.NewReader(b)); err != nil {
			return nil, fmt.Errorf("data: %w", inFile(name, err))
		}
	}
	m, err := fromIDX(x[0], x[1], FashionClasses)
	if err != nil {
		return nil, fmt.Errorf("data: embedded %s pictures: %w", part, err)
	}
	return m, nil
}
