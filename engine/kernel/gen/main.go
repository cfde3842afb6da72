// Command gen writes the assembly of package kernel:
//
//	go run . -out ../kernel_amd64.s -stubs ../stub_amd64.go -pkg kernel
package main

import (
	"bytes"
	"flag"
	"log"
	"os"

	. "github.com/mmcloughlin/avo/build"
)

func main() {
	ConstraintExpr("!race")
	for _, w := range []width{y, z} {
		tiles(w)
		peak(w)
		vectors(w)
		adam(w)
	}
	packs()
	Generate()
	stubs := flag.Lookup("stubs").Value.String()
	text, err := os.ReadFile(stubs)
	if err != nil {
		log.Fatal(err)
	}
	// avo knows basic types only
	if err := os.WriteFile(stubs, bytes.ReplaceAll(text, []byte("args *int)"), []byte("args *tileArgs)")), 0o644); err != nil {
		log.Fatal(err)
	}
}
