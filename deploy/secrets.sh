#!/bin/sh
# Makes the secrets of compose.yaml, once. Nothing that is there is changed.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
# The containers read the files as other users.
chmod 755 secrets

secret() {
    if [ ! -e "secrets/$1" ]; then
        printf '%s' "$2" > "secrets/$1"
        chmod 644 "secrets/$1"
    fi
}

# Passwords are kept as bcrypt. Without the program, its image does the same.
hash() {
    if command -v htpasswd > /dev/null; then
        htpasswd -inB "$1"
    else
        docker run --rm --interactive docker.io/library/httpd:2.4-alpine htpasswd -inB "$1"
    fi
}

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

secret database_password "$(random)"
secret database_url "postgres://longshore:$(cat secrets/database_password)@database/longshore?sslmode=disable"
secret s3_user longshore
secret s3_password "$(random)"
secret s3_credentials "[default]
aws_access_key_id = $(cat secrets/s3_user)
aws_secret_access_key = $(cat secrets/s3_password)
"
if [ ! -e secrets/htpasswd ]; then
    password="$(random)"
    hashed="$(printf '%s' "$password" | hash admin)"
    secret htpasswd "$hashed
"
    echo "user admin, password $password"
fi
