# Sourced from the top folder: make .venv where it is absent, and install requirements.txt, and the file named by
# $more_packages, unless that was done with these very files before.
if [ ! -x .venv/bin/python ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }
    python3 -m venv .venv
fi
for packages in requirements.txt ${more_packages:-}; do
    stamp=.venv/$(echo "$packages" | tr / _).installed
    if ! cmp -s "$packages" "$stamp"; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$packages"
        cp "$packages" "$stamp"
    fi
done
