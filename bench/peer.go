// An upper bound, not a mail queue: net/smtp, with a channel in memory as the queue. Nothing is kept anywhere.
//
//	peer ADDRESS CONNECTIONS MAILS HTML [CERTIFICATES]
//
// HTML is the content, where {number} stands for the mail's number; with CERTIFICATES (a PEM file), STARTTLS comes first.
// It stays when all is sent, so that its processor time can be read.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log"
	"net/smtp"
	"os"
	"strconv"
	"strings"
	"time"
)

type mail struct{ recipient, subject, content string }

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func send(client *smtp.Client, mail mail) {
	must(client.Mail("app@example.org"))
	must(client.Rcpt(mail.recipient))
	writer, err := client.Data()
	must(err)
	_, err = fmt.Fprintf(writer, "From: app@example.org\r\nTo: %s\r\nSubject: %s\r\nDate: %s\r\nMIME-Version: 1.0\r\n"+
		"Content-Type: text/html; charset=\"utf-8\"\r\n\r\n%s\r\n", mail.recipient, mail.subject,
		time.Now().Format(time.RFC1123Z), mail.content)
	must(err)
	must(writer.Close())
}

func work(address string, context *tls.Config, queue chan mail) {
	client, err := smtp.Dial(address)
	must(err)
	if context != nil {
		must(client.StartTLS(context))
	}
	for mail := range queue {
		send(client, mail)
	}
}

func main() {
	var context *tls.Config
	if len(os.Args) > 5 {
		roots := x509.NewCertPool()
		certificates, err := os.ReadFile(os.Args[5])
		must(err)
		roots.AppendCertsFromPEM(certificates)
		context = &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"}
	}
	connections, err := strconv.Atoi(os.Args[2])
	must(err)
	count, err := strconv.Atoi(os.Args[3])
	must(err)
	queue := make(chan mail, count)
	for number := 0; number < count; number++ {
		text := strconv.Itoa(number)
		queue <- mail{"user" + text + "@example.com", "Order " + text, strings.ReplaceAll(os.Args[4], "{number}", text)}
	}
	for number := 0; number < connections; number++ {
		go work(os.Args[1], context, queue)
	}
	time.Sleep(time.Hour)
}
