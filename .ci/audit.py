"""Ask whether anything in this environment has a known hole; exit 1 if so.

What could not be asked about, for want of a network or because the index does not
know it, is listed and passes: a change does not break because a server is down.
"""

import json
import subprocess
import sys

COMMAND = ("-m", "pip_audit", "--local", "--skip-editable", "--format", "json")


def main() -> None:
    """Print what was found, a line a package."""
    done = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print("audit: not done:", done.stderr.strip().rsplit("\n", 1)[-1][:300])
        return
    asked = [package for package in packages if "vulns" in package]
    holes = [(package, hole) for package in asked for hole in package["vulns"]]
    for package, hole in holes:
        fixed = ", ".join(hole["fix_versions"]) or "no version"
        name = f"{package['name']} {package['version']}"
        print(f"audit: {name}: {hole['id']}, mended in {fixed}")
    print(f"audit: {len(asked)} of {len(packages)} asked about, {len(holes)} holes")
    if holes:
        sys.exit(1)


if __name__ == "__main__":
    main()
