// Command fuzzall runs every fuzz target of the module, one after another, for the same time each.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

var target = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`)

func main() {
	budget := flag.Duration("time", time.Minute, "time per target")
	workers := flag.Int("parallel", 0, "workers per target; 0: all cores")
	only := flag.String("run", "", "regular expression of the targets to run")
	root := flag.String("root", ".", "root of the module")
	flag.Parse()
	pick, err := regexp.Compile(*only)
	if err != nil {
		log.Fatal(err)
	}
	var failed []string
	err = filepath.WalkDir(*root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range target.FindAllSubmatch(b, -1) {
			name := string(m[1])
			if !pick.MatchString(name) {
				continue
			}
			fmt.Printf("%s in %s\n", name, filepath.Dir(path))
			args := []string{"test", "-run", "^$", "-fuzz", "^" + name + "$", "-fuzztime", budget.String(), "-fuzzminimizetime", "20x"}
			if *workers > 0 {
				args = append(args, "-parallel", fmt.Sprint(*workers))
			}
			cmd := exec.Command("go", append(args, "./"+filepath.ToSlash(filepath.Dir(path)))...)
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
			if err := cmd.Run(); err != nil {
				failed = append(failed, name)
			}
		}
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if len(failed) > 0 {
		log.Fatalf("failed: %s", strings.Join(failed, ", "))
	}
}
